// The launch of the backward kernel: the largest of all to compile, so each head size and shape has a file of its own.

#pragma once

#include <cuda_runtime.h>

#include "backward_kernel.cuh"
#include "backward_workspace.cuh"
#include "launch.cuh"
#include "relative_bias_attention.h"

namespace onepeace_fast {

using LaunchWalks = const char*(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, const BackwardWorkspace&, const LaunchPlan&,
    void*);

template <typename T, int HEAD_DIM, int VALUE_DIM, bool COMPACT>
const char* launch_walks(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients,
    const BackwardWorkspace& workspace, const LaunchPlan& planned, void* stream) {
    const auto kernel = workspace.is_large ? attention_backward_kernel<T, HEAD_DIM, VALUE_DIM, COMPACT, true>
                                           : attention_backward_kernel<T, HEAD_DIM, VALUE_DIM, COMPACT, false>;
    return launch_kernel(
        kernel, arguments.device, dim3(workspace.parts, arguments.heads, workspace.groups + 1), planned.threads,
        planned.shared_bytes, stream, arguments, gradients, workspace);
}

}  // namespace onepeace_fast

// The entries of the backward pass; backward_kernel.cuh has the kernel.

#include <cuda_runtime.h>
#include <ptx.cuh>

#include "backward_workspace.cuh"
#include "launch.cuh"
#include "relative_bias_attention.h"
#include "relative_bias_attention_backward.cuh"

namespace onepeace_fast {

// Compiled for each head size in a file of its own.
template <typename T, int HEAD_DIM>
const char* launch_backward(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients, void* stream);

namespace {

template <typename T>
const char* launch_type(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients, void* stream) {
    if (arguments.head_dim == 32) return launch_backward<T, 32>(arguments, gradients, stream);
    if (arguments.head_dim == 64) return launch_backward<T, 64>(arguments, gradients, stream);
    return launch_backward<T, 128>(arguments, gradients, stream);
}

}  // namespace

LaunchPlan relative_bias_attention_backward_plan(int32_t head_dim, int64_t bias_entries) {
    return head_dim == 32   ? backward_plan<32>(bias_entries)
           : head_dim == 64 ? backward_plan<64>(bias_entries)
                            : backward_plan<128>(bias_entries);
}

int64_t relative_bias_attention_backward_workspace(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients) {
    if (check_arguments(arguments)) return 0;
    return arguments.head_dim == 32   ? share<32>(arguments, gradients).bytes
           : arguments.head_dim == 64 ? share<64>(arguments, gradients).bytes
                                      : share<128>(arguments, gradients).bytes;
}

int64_t relative_bias_attention_backward_bytes(
    int32_t samples, int32_t length, int32_t heads, int32_t head_dim, int32_t bias_entries, int32_t multiprocessors) {
    RelativeBiasAttention arguments{};
    arguments.samples = samples;
    arguments.modalities = arguments.bias_vectors = 1;
    arguments.heads = heads;
    arguments.rows = samples * length;
    arguments.max_length = length;
    arguments.bias[0].entries = bias_entries;
    RelativeBiasAttentionGradients gradients{};
    gradients.multiprocessors = multiprocessors;
    gradients.bias[0] = &arguments;  // no null: it learns
    return head_dim == 32   ? count_bytes<32>(arguments, gradients)
           : head_dim == 64 ? count_bytes<64>(arguments, gradients)
                            : count_bytes<128>(arguments, gradients);
}

const char* relative_bias_attention_backward(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients, void* stream) {
    if (const char* problem = check_arguments(arguments)) return problem;
    if (!is_aligned(gradients.grad, 16) || gradients.row_stride % 8 || gradients.head_stride % 8) {
        return "grad: got an address or strides off 16 bytes, takes multiples of 16 bytes; pass a contiguous copy";
    }
    if (!is_aligned(gradients.qkv, 16) || !is_aligned(gradients.workspace, 16)) {
        return "workspace: got an address off 16 bytes, its own or of the gradient of qkv, takes multiples of 16; "
               "allocate them anew";
    }
    return arguments.type == FLOAT16 ? launch_type<float16>(arguments, gradients, stream)
                                     : launch_type<bfloat16>(arguments, gradients, stream);
}

}  // namespace onepeace_fast

// The launches of a backward pass, one after another.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "backward_row_sums.cuh"
#include "backward_sums.cuh"
#include "backward_workspace.cuh"
#include "bias.cuh"
#include "launch.cuh"
#include "relative_bias_attention.h"
#include "relative_bias_attention_forward.cuh"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

// Compiled for each head size and shape in a file of its own.
template <typename T, int HEAD_DIM, bool COMPACT>
const char* launch_walks(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients,
    const BackwardWorkspace& workspace, const LaunchPlan& planned, void* stream);

template <typename T, int HEAD_DIM>
const char* launch_row_sums(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients,
    const BackwardWorkspace& workspace, void* stream) {
    RelativeBiasAttention base_2 = arguments;
    base_2.scale *= LOG2_E;
    const int64_t entries = workspace.entries - CLS_ENTRIES * arguments.bias_vectors;
    const LaunchPlan planned = relative_bias_attention_forward_plan(HEAD_DIM, entries);
    const auto kernel =
        entries > BIAS_CAPACITY ? row_sums_kernel<T, HEAD_DIM, true> : row_sums_kernel<T, HEAD_DIM, false>;
    const dim3 blocks(
        ceil_div(workspace.longest, ForwardLaunch<HEAD_DIM>::WARPS), arguments.heads, arguments.samples);
    return launch_kernel(
        kernel, arguments.device, blocks, planned.threads, planned.shared_bytes, stream, base_2, gradients, workspace,
        static_cast<int>(std::min<int64_t>(entries, BIAS_CAPACITY)));
}

template <typename T, int HEAD_DIM>
const char* launch_backward(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients, const BackwardPlan& plan,
    void* stream) {
    const BackwardWorkspace workspace = share(arguments, gradients, plan);
    const bool has_parts = workspace.query_parts && arguments.samples;
    const char* problem = nullptr;
    if (has_parts) problem = launch_row_sums<T, HEAD_DIM>(arguments, gradients, workspace, stream);
    if (problem) return problem;
    const auto launch = launch_walks<T, HEAD_DIM, false>;
    const auto launch_compact = launch_walks<T, HEAD_DIM, HAS_COMPACT_SHAPE<HEAD_DIM>>;
    problem = (plan.is_compact ? launch_compact : launch)(arguments, gradients, workspace, plan.launch, stream);
    if (!problem && has_parts) {
        const dim3 blocks(
            ceil_div(workspace.longest * BLOCK_ROWS, SUM_THREADS / (HEAD_DIM / CHUNK)), arguments.heads,
            arguments.samples);
        problem = launch_kernel(
            sum_queries_kernel<T, HEAD_DIM>, arguments.device, blocks, SUM_THREADS, sizeof(Sample), stream, arguments,
            gradients, workspace);
    }
    if (!problem && (workspace.entry_parts || workspace.scale_parts)) {
        const dim3 blocks(std::max(1, ceil_div(workspace.entries, SUM_THREADS)), arguments.heads);
        problem = launch_kernel(
            sum_entries_kernel, arguments.device, blocks, SUM_THREADS, 0, stream, arguments, gradients, workspace);
    }
    return problem;
}

}  // namespace onepeace_fast

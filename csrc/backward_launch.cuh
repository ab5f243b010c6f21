// In which shape a backward pass is launched, and its launches, one after another.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "backward_memory.cuh"
#include "backward_row_sums.cuh"
#include "backward_sums.cuh"
#include "backward_workspace.cuh"
#include "bias.cuh"
#include "difference_sums.cuh"
#include "forward_memory.cuh"
#include "launch.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

// What shared memory is for, first come first served: keys and queries, without which nothing runs; the vectors with
// their sums in fixed point, which any codes need; and of what is left, sums by block difference, which only save time.
// Row blocks that are runs are as a rule 16 codes or more apart, so of all differences one is for 16 entries.
template <typename Launch>
BackwardPlan backward_plan(int64_t entries, int64_t shared_limit) {
    const int64_t least = sizeof(BackwardShared<bfloat16, Launch>), vectors = vector_bytes(false, entries);
    const bool is_large = least + vectors > shared_limit;
    const int64_t taken = least + (is_large ? 0 : vectors);
    const int64_t left = std::max<int64_t>(0, shared_limit - taken) / static_cast<int64_t>(sizeof(DifferenceSums));
    const int64_t differences = std::min(left, (entries + BLOCK_ROWS - 1) / BLOCK_ROWS);
    const int64_t bytes = taken + differences * static_cast<int64_t>(sizeof(DifferenceSums));
    const LaunchPlan launch{Launch::THREADS, 1, static_cast<int32_t>(bytes)};
    return {launch, Launch::COMPACT, is_large, Launch::KEY_BLOCKS, static_cast<int32_t>(differences)};
}

// For a head size, the entries of all vectors with those of CLS, and the bytes that a thread block may have: the larger
// shape where it fits beside a vector of a 16 x 16 grid, and in either the vectors with the sums of their gradient
// where they do.
template <int HEAD_DIM, int VALUE_DIM>
BackwardPlan choose_backward_plan(int64_t entries, int64_t shared_limit) {
    using Larger = BackwardLaunch<HEAD_DIM, VALUE_DIM, false>;
    if constexpr (HAS_COMPACT_SHAPE<HEAD_DIM>) {
        constexpr int64_t OF_GRID = vector_bytes(false, 31 * 31 + CLS_ENTRIES);
        constexpr int64_t NEEDED = sizeof(BackwardShared<bfloat16, Larger>) + OF_GRID;
        if (NEEDED > shared_limit) {
            return backward_plan<BackwardLaunch<HEAD_DIM, VALUE_DIM, true>>(entries, shared_limit);
        }
    }
    return backward_plan<Larger>(entries, shared_limit);
}

inline BackwardPlan choose_backward_plan(
    int32_t head_dim, int32_t value_dim, int64_t entries, int64_t shared_limit) {
    return with_head_sizes(head_dim, value_dim, [&](auto head_size, auto value_size) {
        return choose_backward_plan<head_size.value, value_size.value>(entries, shared_limit);
    });
}

// Of the backward kernel; backward_walks.cuh has it, compiled for each head size and shape in a file of its own.
template <typename T, int HEAD_DIM, int VALUE_DIM, bool COMPACT>
const char* launch_walks(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients,
    const BackwardWorkspace& workspace, const LaunchPlan& planned, void* stream);

// Row blocks of a sample's queries that the grids of the smaller kernels have room for: no more than all rows fill,
// whatever max_length promises.
inline int launched_row_blocks(const RelativeBiasAttention& arguments, const BackwardWorkspace& workspace) {
    return std::min(workspace.query_row_blocks, most_row_blocks(arguments, arguments.queries.rows));
}

template <typename T, int HEAD_DIM, int VALUE_DIM>
const char* launch_row_sums(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients,
    const BackwardWorkspace& workspace, void* stream) {
    RelativeBiasAttention base_2 = arguments;
    base_2.scale *= LOG2_E;
    const int64_t entries = workspace.entries - CLS_ENTRIES * arguments.bias_vectors;
    const ForwardPlan plan = choose_forward_plan<HEAD_DIM, VALUE_DIM>(entries, shared_limit(arguments.device));
    const auto kernel = plan.is_large     ? attention_row_sums_kernel<T, HEAD_DIM, VALUE_DIM, true, true>
                        : plan.is_compact ? attention_row_sums_kernel<T, HEAD_DIM, VALUE_DIM, true, false>
                                          : attention_row_sums_kernel<T, HEAD_DIM, VALUE_DIM, false, false>;
    const int parts = ceil_div(launched_row_blocks(arguments, workspace), plan.query_blocks);
    const dim3 grid(parts, arguments.heads, arguments.samples);
    return launch_kernel(
        kernel, arguments.device, grid, plan.launch.threads, plan.launch.shared_bytes, stream, base_2, gradients,
        workspace, plan.bias_capacity);
}

template <typename T, int HEAD_DIM, int VALUE_DIM>
const char* launch_backward(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients, const BackwardPlan& plan,
    void* stream) {
    const BackwardWorkspace workspace = plan_workspace(arguments, gradients, plan);
    const bool has_parts = workspace.query_parts && arguments.samples;
    const char* problem = nullptr;
    if (has_parts) problem = launch_row_sums<T, HEAD_DIM, VALUE_DIM>(arguments, gradients, workspace, stream);
    if (problem) return problem;
    const auto launch = launch_walks<T, HEAD_DIM, VALUE_DIM, false>;
    const auto launch_compact = launch_walks<T, HEAD_DIM, VALUE_DIM, HAS_COMPACT_SHAPE<HEAD_DIM>>;
    problem = (plan.is_compact ? launch_compact : launch)(arguments, gradients, workspace, plan.launch, stream);
    if (!problem && has_parts) {
        const int rows = launched_row_blocks(arguments, workspace) * BLOCK_ROWS;
        const dim3 grid(ceil_div(rows, SUM_THREADS / (HEAD_DIM / CHUNK)), arguments.heads, arguments.samples);
        problem = launch_kernel(
            attention_sum_queries_kernel<T, HEAD_DIM>, arguments.device, grid, SUM_THREADS, sizeof(SampleOfBoth),
            stream, arguments, gradients, workspace);
    }
    if (!problem && (workspace.entry_parts || workspace.scale_parts)) {
        const dim3 grid(std::max(1, ceil_div(workspace.entries, SUM_THREADS)), arguments.heads);
        problem = launch_kernel(
            attention_sum_entries_kernel, arguments.device, grid, SUM_THREADS, 0, stream, arguments, gradients,
            workspace);
    }
    return problem;
}

}  // namespace onepeace_fast

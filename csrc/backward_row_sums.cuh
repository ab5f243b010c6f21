// The sum over all keys of probability times its gradient, of every query row whose sample is not walked whole by one
// thread block: the mean that the softmax's gradient subtracts. The head scale is not in it.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cmath>

#include "backward_workspace.cuh"
#include "query_walk.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

// Of 16 columns, in the products of grad: all of them, but on compute capability 8 and 10, where they spill.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ / 100 == 10)
constexpr int STEPS_AT_ONCE = 2;
#else
constexpr int STEPS_AT_ONCE = 8;
#endif

// A warp's 16 rows of grad. What their keys sum to so far stands in RowSumState between tiles.
template <typename T, typename Launch>
struct RowSums {
    static constexpr int VALUE_DIM = Launch::VALUE_DIM;

    const T* grad[2];  // of this thread's two rows, from its columns on

    template <bool WINDOWED>
    __device__ __forceinline__ RowSums(
        const Forward<T, Launch, WINDOWED>& forward, const RelativeBiasAttentionGradients& gradients) {
        const int warp = thread_index() / WARP, lane = thread_index() % WARP;
        __syncwarp();  // lane 0 wrote this warp's row block
        const RowBlock& row_block = forward.shared.query_rows[warp];
        if (row_block.count == 0) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t row =
                find_row(forward.shared.sample, forward.arguments.modalities, row_block, lane / 4 + 8 * i).index;
            RowSumState& state = forward.shared.row_sum_states[thread_index()];
            const float log_sum_exp = gradients.log_sum_exp[row * forward.arguments.heads + blockIdx.y];
            state.log_sum_exp[i] = log_sum_exp == -INFINITY ? INFINITY : LOG2_E * log_sum_exp;  // it sees no key
            state.sum[i] = 0.f;
            grad[i] = static_cast<const T*>(gradients.grad) + row * gradients.row_stride +
                      blockIdx.y * gradients.head_stride + 2 * (lane % 4);
        }
    }

    template <int COLUMNS, bool WINDOWED>
    __device__ __forceinline__ void attend(
        float (&scores)[COLUMNS / 8][4], const Forward<T, Launch, WINDOWED>& forward, int stage) {
        const int lane = thread_index() % WARP;
        float gradients[COLUMNS / 8][4] = {};
#pragma unroll STEPS_AT_ONCE
        for (int k = 0; k < VALUE_DIM / 16; ++k) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const uint32_t*>(grad[i % 2] + 16 * k + i / 2 * 8);
#pragma unroll
            for (int j = 0; j < COLUMNS / 16; ++j) {
                uint32_t b[4];
                transposed_right_operand<VALUE_DIM>(b, forward.shared.values[stage], lane, j, k);
                mma<T>(gradients[2 * j], a, b[0], b[1]);
                mma<T>(gradients[2 * j + 1], a, b[2], b[3]);
            }
        }
        RowSumState& state = forward.shared.row_sum_states[thread_index()];
        const float scale = score_scale(forward.arguments);
        float sum[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) {
            const int row = i % 4 / 2;
            const float score = scale * scores[i / 4][i % 4];
            sum[row] += fast_exp2(score - state.log_sum_exp[row]) * gradients[i / 4][i % 4];
        }
        for (int i = 0; i < 2; ++i) state.sum[i] += sum[i];
    }

    // row_sums is [rows, heads].
    template <bool WINDOWED>
    __device__ __forceinline__ void store(const Forward<T, Launch, WINDOWED>& forward, float* row_sums) const {
        const RowBlock& row_block = forward.shared.query_rows[thread_index() / WARP];
        const int lane = thread_index() % WARP;
        for (int i = 0; i < 2; ++i) {
            const float total = row_sum(forward.shared.row_sum_states[thread_index()].sum[i]);
            const int row = lane / 4 + 8 * i;
            if (lane % 4 == 0 && row < row_block.count) {
                const int64_t index =
                    find_row(forward.shared.sample, forward.arguments.modalities, row_block, row).index;
                row_sums[index * forward.arguments.heads + blockIdx.y] = total;
            }
        }
    }
};

// The row sums. Thread blocks: parts that share the queries of a sample, heads, samples. Tiles, warps and shared memory
// are those of the forward kernel.
//
//     heads of                     32        64       96    128/64     128   of keys/of values
//     registers, sm_80        94, 122   96, 118   94, 94    70, 71  70, 70   the second with windows
//     registers, sm_90a       95, 126   96, 132  96, 114    83, 84  93, 93
//     thread blocks for each     2, 1      2, 1     2, 1      2, 1    2, 1   multiprocessor of compute capability 9.0
//
// Registers by ptxas of nvcc 13.0, no spills. Bound as the forward kernel is: it has as many matrix products.
template <typename T, int HEAD_DIM, int VALUE_DIM, bool WINDOWED>
__global__ void __launch_bounds__(
    (ForwardLaunch<HEAD_DIM, VALUE_DIM>::THREADS),
    (ForwardLaunch<HEAD_DIM, VALUE_DIM>::thread_blocks_at_once(WINDOWED)))
attention_row_sums_kernel(
    const __grid_constant__ RelativeBiasAttention arguments,
    const __grid_constant__ RelativeBiasAttentionGradients gradients,
    const __grid_constant__ BackwardWorkspace workspace, int bias_capacity) {
    using Launch = ForwardLaunch<HEAD_DIM, VALUE_DIM>;
    auto& shared = *static_cast<ForwardShared<T, Launch>*>(shared_memory());
    const Forward<T, Launch, WINDOWED> forward{arguments, shared};
    read_sample<Launch::KEYS>(shared.sample, shared.key_sample, arguments, blockIdx.z);
    __syncthreads();
    if (workspace.walks_whole(shared.key_sample)) return;
    walk_queries<RowSums<T, Launch>>(
        forward, bias_capacity,
        [&](const RowSums<T, Launch>& rows) { rows.store(forward, workspace.row_sums); }, gradients);
}

}  // namespace onepeace_fast

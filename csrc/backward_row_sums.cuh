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

// Of 16 columns, in the products of grad: all of them, but on compute capability 8 and 10, where they spill, and so do
// two with two row blocks.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ / 100 == 10)
template <int ROW_BLOCKS>
constexpr int STEPS_AT_ONCE = 2 / ROW_BLOCKS;
#else
template <int ROW_BLOCKS>
constexpr int STEPS_AT_ONCE = 8;
#endif

// A warp's row blocks of grad. What their keys sum to so far stands in RowSumState between tiles.
template <typename T, typename Launch>
struct RowSums {
    static constexpr int VALUE_DIM = Launch::VALUE_DIM, ROW_BLOCKS = Launch::ROW_BLOCKS;

    const T* grad[ROW_BLOCKS][2];  // of this thread's two rows of each, from its columns on

    template <bool WINDOWED>
    __device__ __forceinline__ RowSums(
        const Forward<T, Launch, WINDOWED>& forward, const RelativeBiasAttentionGradients& gradients) {
        const int first = forward.first_query_block(), lane = thread_index() % WARP;
        __syncwarp();  // lane 0 wrote this warp's row blocks
        if (forward.shared.query_rows[first].count == 0) return;
#pragma unroll
        for (int k = 0; k < 2 * ROW_BLOCKS; ++k) {
            const int block = k / 2, i = k % 2;
            // In place of one that is not there stands the first one, and its results are not stored.
            const RowBlock& row_block =
                forward.shared.query_rows[forward.shared.query_rows[first + block].count ? first + block : first];
            const int64_t row =
                find_row(forward.shared.sample, forward.arguments.modalities, row_block, lane / 4 + 8 * i).index;
            RowSumState& state = forward.shared.row_sum_states[block][thread_index()];
            const float log_sum_exp = gradients.log_sum_exp[row * forward.arguments.heads + blockIdx.y];
            state.log_sum_exp[i] = log_sum_exp == -INFINITY ? INFINITY : LOG2_E * log_sum_exp;  // it sees no key
            state.sum[i] = 0.f;
            grad[block][i] = static_cast<const T*>(gradients.grad) + row * gradients.row_stride +
                             blockIdx.y * gradients.head_stride + 2 * (lane % 4);
        }
    }

    template <int COLUMNS, bool WINDOWED>
    __device__ __forceinline__ void attend(
        float (&scores)[ROW_BLOCKS][COLUMNS / 8][4], const Forward<T, Launch, WINDOWED>& forward, int stage) {
        const int lane = thread_index() % WARP;
        float gradients[ROW_BLOCKS][COLUMNS / 8][4] = {};
#pragma unroll STEPS_AT_ONCE<ROW_BLOCKS>
        for (int k = 0; k < VALUE_DIM / 16; ++k) {
            uint32_t a[ROW_BLOCKS][4];
#pragma unroll
            for (int i = 0; i < 4 * ROW_BLOCKS; ++i) {
                const T* from = grad[i / 4][i % 2] + 16 * k + i % 4 / 2 * 8;
                a[i / 4][i % 4] = *reinterpret_cast<const uint32_t*>(from);
            }
#pragma unroll
            for (int j = 0; j < COLUMNS / 16; ++j) {
                uint32_t b[4];
                transposed_right_operand<VALUE_DIM>(b, forward.shared.values[stage], lane, j, k);
#pragma unroll
                for (int i = 0; i < ROW_BLOCKS; ++i) {
                    mma<T>(gradients[i][2 * j], a[i], b[0], b[1]);
                    mma<T>(gradients[i][2 * j + 1], a[i], b[2], b[3]);
                }
            }
        }
        const float scale = score_scale(forward.arguments);
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
            RowSumState& state = forward.shared.row_sum_states[block][thread_index()];
            float sum[2] = {0.f, 0.f};
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; ++i) {
                const int row = i % 4 / 2;
                const float score = scale * scores[block][i / 4][i % 4];
                sum[row] += fast_exp2(score - state.log_sum_exp[row]) * gradients[block][i / 4][i % 4];
            }
            for (int i = 0; i < 2; ++i) state.sum[i] += sum[i];
        }
    }

    // A row block; row_sums is [rows, heads].
    template <bool WINDOWED>
    __device__ __forceinline__ void store(
        const Forward<T, Launch, WINDOWED>& forward, int block, float* row_sums) const {
        const RowBlock& row_block = forward.shared.query_rows[forward.first_query_block() + block];
        const int lane = thread_index() % WARP;
        for (int i = 0; i < 2; ++i) {
            const float total = row_sum(forward.shared.row_sum_states[block][thread_index()].sum[i]);
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
//     heads of                      32         64        96    128/64       128   of keys/of values
//     registers, sm_80             166        166       139       139       102
//     registers, sm_90a            166        168       194       166       162
//     compact, sm_80          101, 122   118, 118    94, 94    70, 71    70, 70   the second with windows
//     compact, sm_90a          99, 126   118, 132  110, 114    83, 84    93, 93
//
// Registers by ptxas of nvcc 13.0, no spills. Bound as the forward kernel is: it has as many matrix products.
template <typename T, int HEAD_DIM, int VALUE_DIM, bool COMPACT, bool WINDOWED>
__global__ void __launch_bounds__(
    (ForwardLaunch<HEAD_DIM, VALUE_DIM, COMPACT>::THREADS), (ForwardLaunch<HEAD_DIM, VALUE_DIM, COMPACT>::AT_ONCE))
attention_row_sums_kernel(
    const __grid_constant__ RelativeBiasAttention arguments,
    const __grid_constant__ RelativeBiasAttentionGradients gradients,
    const __grid_constant__ BackwardWorkspace workspace, int bias_capacity) {
    using Launch = ForwardLaunch<HEAD_DIM, VALUE_DIM, COMPACT>;
    auto& shared = *static_cast<ForwardShared<T, Launch>*>(shared_memory());
    const Forward<T, Launch, WINDOWED> forward{arguments, shared};
    read_sample<Launch::KEYS>(shared.sample, shared.key_sample, arguments, blockIdx.z);
    __syncthreads();
    if (workspace.walks_whole(shared.key_sample)) return;
    walk_queries<RowSums<T, Launch>>(
        forward, bias_capacity,
        [&](const RowSums<T, Launch>& rows) {
            for (int i = 0; i < Launch::ROW_BLOCKS; ++i) rows.store(forward, i, workspace.row_sums);
        },
        gradients);
}

}  // namespace onepeace_fast

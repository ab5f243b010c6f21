// A key block more than warps have slots for, spread over all of them: most often the CLS row of an image whose patches
// fill the slots. Two warps find its probabilities, each row's score gradient is one warp's, and every warp holds some
// columns of its gradients.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include "backward_memory.cuh"
#include "bias.cuh"
#include "bias_gradient.cuh"
#include "gradient_rows.cuh"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

template <typename T, typename Launch, bool LARGE>
struct SpreadKeyBlock {
    static constexpr int HEAD_DIM = Launch::HEAD_DIM;
    static constexpr int KEY_BLOCK = Launch::SLOT_KEY_BLOCKS;  // its place among the walk's
    static constexpr int VALUE_DIM = Launch::VALUE_DIM;

    // Of a matrix of SIZE columns: how many times eight of them a warp has, at most.
    template <int SIZE>
    static constexpr int TILES = (SIZE / 8 + Launch::WARPS - 1) / Launch::WARPS;

    const Backward<T, Launch, LARGE>& backward;
    float key_gradient[TILES<HEAD_DIM>][4] = {};
    float value_gradient[TILES<VALUE_DIM>][4] = {};

    // No row past the last one ever has a probability. Behind a barrier.
    __device__ void begin() const {
        for (int i = thread_index(); i < BLOCK_ROWS * TILE; i += Launch::THREADS) {
            backward.shared.spread_rows[i] = from_float<T>(0.f);
            backward.shared.score_gradient[KEY_BLOCK * BLOCK_ROWS * TILE + i] = from_float<T>(0.f);
        }
    }

    // Leave probabilities and their gradients in shared memory; returns the largest magnitude among the latter.
    __device__ __forceinline__ uint32_t find_probabilities(int stage) const {
        auto& shared = backward.shared;
        const int half = thread_index() / WARP, lane = thread_index() % WARP;
        uint32_t largest = 0;
        if (half >= HALVES) return largest;
        float scores[2][4] = {}, gradients[2][4] = {};
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; ++k) {
            uint32_t a[4], b[4];
            left_operand<HEAD_DIM>(a, shared.keys, lane, KEY_BLOCK, k);
            transposed_right_operand<HEAD_DIM>(b, shared.queries[stage], lane, half, k);
            mma<T>(scores[0], a, b[0], b[1]);
            mma<T>(scores[1], a, b[2], b[3]);
            if (k >= VALUE_DIM / 16) continue;
            left_operand<VALUE_DIM>(a, shared.values, lane, KEY_BLOCK, k);
            transposed_right_operand<VALUE_DIM>(b, shared.grad[stage], lane, half, k);
            mma<T>(gradients[0], a, b[0], b[1]);
            mma<T>(gradients[1], a, b[2], b[3]);
        }
        backward.find_probabilities(scores, stage, KEY_BLOCK, half);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = lane / 4 + i % 4 / 2 * 8, query = half * BLOCK_ROWS + i / 4 * 8 + 2 * (lane % 4) + i % 2;
            const float probability = scores[i / 4][i % 4], gradient = gradients[i / 4][i % 4];
            shared.spread.probabilities[row][query] = probability;
            shared.spread.gradients[row][query] = gradient;
            largest = max(largest, magnitude(gradient));
        }
        return largest;
    }

    // What its keys add to the sum of probability times gradient of the query that a lane has.
    __device__ __forceinline__ float row_sum() const {
        const int lane = thread_index() % WARP;
        float sum = 0.f;
#pragma unroll 1
        for (int row = 0; row < backward.shared.key_rows[KEY_BLOCK].count; ++row) {
            sum += backward.shared.spread.probabilities[row][lane] * backward.shared.spread.gradients[row][lane];
        }
        return sum;
    }

    // Leave ds, `mean` being that of a lane's query, and add it to the sums of entries.
    __device__ __forceinline__ void differentiate(int stage, float mean, const Sums& sums) const {
        auto& shared = backward.shared;
        const int lane = thread_index() % WARP, half = lane / BLOCK_ROWS, chunk = lane / CHUNK;
        const Side keys = backward.keys(KEY_BLOCK), queries = backward.queries(stage, half);
#pragma unroll 1
        for (int row = thread_index() / WARP; row < keys.count; row += Launch::WARPS) {
            const float probability = shared.spread.probabilities[row][lane];
            const float gradient =
                backward.head_scale() * probability * (shared.spread.gradients[row][lane] - mean);
            const int place = swizzled<TILE>(row, chunk) + lane % CHUNK;
            shared.spread_rows[place] = from_float<T>(probability);
            shared.score_gradient[KEY_BLOCK * BLOCK_ROWS * TILE + place] = from_float<T>(gradient);
            if (!backward.is_learned()) continue;
            const int entry = find_entry(
                backward.arguments, shared.bias_start, keys, row, queries, lane % BLOCK_ROWS);
            // Body queries of a row block share the entry of a CLS key.
            float sum = gradient;
            for (int step = BLOCK_ROWS / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
            const bool shares = keys.is_cls && !queries.is_cls;
            if (entry >= 0 && queries.count && (!shares || lane % BLOCK_ROWS == 0)) {
                sums.add(entry, shares ? sum : gradient);
            }
        }
    }

    // Gradients of keys and values += ds^T queries and p^T grad, behind the barrier that follows differentiate.
    __device__ __forceinline__ void accumulate(int stage) {
        const auto& shared = backward.shared;
        add<VALUE_DIM>(value_gradient, shared.spread_rows, shared.grad[stage]);
        add<HEAD_DIM>(key_gradient, shared.score_gradient + KEY_BLOCK * BLOCK_ROWS * TILE, shared.queries[stage]);
    }

    __device__ __forceinline__ void store() const {
        auto& shared = backward.shared;
        store_columns<HEAD_DIM>(key_gradient, backward.arguments.scale, shared.keys, backward.gradients.k);
        store_columns<VALUE_DIM>(value_gradient, backward.head_scale(), shared.values, backward.gradients.v);
    }

private:
    // Which eight columns are a warp's, past the last where it has fewer.
    template <int SIZE>
    __device__ static int own_columns(int i) {
        return thread_index() / WARP * TILES<SIZE> + i;
    }

    // sums += left right: left [BLOCK_ROWS, TILE], right [TILE, SIZE], both in shared memory.
    template <int SIZE>
    __device__ __forceinline__ void add(float (&sums)[TILES<SIZE>][4], const T* left, const T* right) {
        const int lane = thread_index() % WARP;
#pragma unroll
        for (int i = 0; i < TILES<SIZE>; ++i) {
            const int tile = own_columns<SIZE>(i);
            if (tile >= SIZE / 8) continue;
#pragma unroll
            for (int k = 0; k < HALVES; ++k) {
                uint32_t a[4], b[4];
                left_operand<TILE>(a, left, lane, 0, k);
                right_operand<SIZE>(b, right, lane, k, tile / 2);
                mma<T>(sums[i], a, tile % 2 ? b[2] : b[0], tile % 2 ? b[3] : b[1]);
            }
        }
    }

    // Through the memory `staged` that held the keys or values: [KEY_BLOCKS, BLOCK_ROWS, SIZE].
    template <int SIZE>
    __device__ __forceinline__ void store_columns(
        const float (&sums)[TILES<SIZE>][4], float factor, T* staged, const GradientRows& gradient) const {
        const int lane = thread_index() % WARP;
#pragma unroll
        for (int i = 0; i < TILES<SIZE>; ++i) {
            const int tile = own_columns<SIZE>(i);
            if (tile >= SIZE / 8) continue;
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                T* target =
                    staged + swizzled<SIZE>(KEY_BLOCK * BLOCK_ROWS + lane / 4 + 8 * below, tile) + 2 * (lane % 4);
                *reinterpret_cast<uint32_t*>(target) =
                    pack<T>(sums[i][2 * below] * factor, sums[i][2 * below + 1] * factor);
            }
            __syncwarp();  // the columns are complete
            if (lane < backward.shared.key_rows[KEY_BLOCK].count) {
                const int row = KEY_BLOCK * BLOCK_ROWS + lane;
                T* target = gradient_row<T, SIZE>(gradient, backward.find_key(row).index) + tile * CHUNK;
                *reinterpret_cast<uint4*>(target) =
                    *reinterpret_cast<const uint4*>(staged + swizzled<SIZE>(row, tile));
            }
        }
    }
};

}  // namespace onepeace_fast

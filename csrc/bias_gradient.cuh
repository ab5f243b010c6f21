// The gradient of vectors in code form: score gradients, added up by entry. Integers in fixed point make the order of
// additions, and so the order in which warps run, irrelevant: the same input gives the same bits.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>

#include "bias.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"

namespace onepeace_fast {

constexpr int MOST_EXPONENT = 110;  // 2^exponent, also with the low bits, and its inverse are normal numbers
constexpr int SUM_BITS = 30;        // of a sum of score gradients; the rest is for the rounding of each
constexpr int MOST_LOW_BITS = 15;
constexpr int MOST_RUN_PAIRS = 4;  // by diagonals; with more, each pair by itself
constexpr uint32_t INFINITE_BITS = 0x7f800000;

__device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// The magnitude's bits, which order as numbers do, and NaN above all.
__device__ __forceinline__ uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7fffffff; }

// What the magnitudes of some rows' score gradients add up to at most, where each score's gradient, before its row's
// mean is subtracted, has at most a magnitude: a row's probabilities sum to one, so its score gradients to twice that.
__device__ __forceinline__ uint32_t bound_sums(uint32_t largest, float head_scale, int rows) {
    return magnitude(2.f * rows * head_scale * __uint_as_float(largest));
}

// The exponent of the fixed point for sums up to a bound.
__device__ __forceinline__ int fixed_point(uint32_t bound) {
    const int above = static_cast<int>(bound >> 23) - 126;  // 2^above is above the bound
    return max(-MOST_EXPONENT, min(MOST_EXPONENT, SUM_BITS - above));
}

// Bits behind those of the fixed point, in integers of their own: as many as all pairs of some rows can add up.
__device__ __forceinline__ int low_bits(int rows) {
    return max(0, min(MOST_LOW_BITS, 31 - 2 * (32 - __clz(rows))));
}

// Sums of entries as integers.
struct Sums {
    int* high;  // [2, entries]: in units of the fixed point, and their low bits
    int entries;
    float unit;      // 2^exponent
    float low_unit;  // 2^low bits

    __device__ __forceinline__ void add(int entry, float value) const {
        const float scaled = value * unit;
        const int rounded = __float2int_rn(scaled);
        atomicAdd(high + entry, rounded);
        atomicAdd(high + entries + entry, __float2int_rn((scaled - rounded) * low_unit));
    }
};

// Bit r: row r of a row block does not continue the codes before it. By a warp, for two row blocks, a row for each
// lane: code [BLOCK_ROWS] of the lane's own.
__device__ __forceinline__ uint32_t find_run_starts(const int* code, int count) {
    const int row = thread_index() % BLOCK_ROWS;
    const bool starts = row < count && (row == 0 || code[row] != code[row - 1] + 1);
    return __ballot_sync(0xffffffff, starts);
}

__device__ __forceinline__ int first_run(uint32_t starts) { return __ffs(starts) - 1; }

// Where the first run ends, in a row block of `count` rows.
__device__ __forceinline__ int next_run(uint32_t starts, int count) {
    const uint32_t later = starts & (starts - 1);
    return later ? first_run(later) : count;
}

// Add the sums along the diagonals of 16 keys by 16 queries to consecutive entries: of diagonal d = query - key to
// entry + d, for d in first..last. With g = lane / 4 and t = lane % 4, a lane has these values, diagonals beside them:
//
//                        query 2t, 2t + 1                    8 + 2t, 9 + 2t
//     key g          [0][0], [0][1]: 2t-g, 2t-g+1     [1][0], [1][1]: 2t-g+8, 2t-g+9
//     key g + 8      [0][2], [0][3]: 2t-g-8, 2t-g-7   [1][2], [1][3]: 2t-g, 2t-g+1
//
// Of each 8 x 8 quarter, by the lanes that have them, along one diagonal:
//
//     query   0  1  2  3  4  5  6  7
//     key 0   0  0  1  1  2  2  3  3
//         1   4  4  5  5  6  6  7  7     1. An odd value moves up one row: that of lane + 4 is on the diagonal of this
//         2   8  8  9  9 10 10 11 11        lane's even one. From key 0 it goes to key 7, 8 diagonals further.
//         3  12 12 13 13 14 14 15 15
//         ..                             Then a lane has four sums, on diagonals 2t-g + {-8, 0, 8, 16}. Lanes with the
//         7  28 28 29 29 30 30 31 31        same (2t-g) % 8 share diagonals, as 0, 9, 18 and 27 do -16, -8, 0 and 8:
//
//     2. 0 <-> 9 and 18 <-> 27 give each other two sums:    0: -16, -8    9: 0, 8    18: -16, -8    27: 0, 8
//     3. 0 <-> 18 and 9 <-> 27 give each other one:         0: -16        9: 0       18: -8         27: 8
__device__ __forceinline__ void add_diagonals(
    const float (&values)[2][4], int first, int last, const Sums& sums, int entry) {
    constexpr unsigned ALL = 0xffffffff;
    const int lane = thread_index() % WARP, g = lane / 4, t = lane % 4;
    const float even[3] = {values[0][2], values[0][0] + values[1][2], values[1][0]};
    const float odd[3] = {values[0][3], values[0][1] + values[1][3], values[1][1]};
    // Step 1.
    const int below = (lane + 4) % WARP;
    const float outer = __shfl_sync(ALL, g == 0 ? odd[2] : odd[0], below);
    const float sum[4] = {
        even[0] + (g == 7 ? 0.f : outer), even[1] + __shfl_sync(ALL, g == 0 ? odd[0] : odd[1], below),
        even[2] + __shfl_sync(ALL, g == 0 ? odd[1] : odd[2], below), g == 7 ? outer : 0.f};
    // Sums by the eighth that their diagonal is in: eighth i begins at 8 i - 16.
    const bool later = 2 * t >= g;
    const float eighths[4] = {
        later ? 0.f : sum[0], later ? sum[0] : sum[1], later ? sum[1] : sum[2], later ? sum[2] : sum[3]};
    // Steps 2 and 3.
    const bool right = t % 2;
    const int partner = ((right ? g + 6 : g + 2) % 8) * 4 + (t ^ 1);
    const float low = (right ? eighths[2] : eighths[0]) + __shfl_sync(ALL, right ? eighths[0] : eighths[2], partner);
    const float high = (right ? eighths[3] : eighths[1]) + __shfl_sync(ALL, right ? eighths[1] : eighths[3], partner);
    const bool upper = t / 2;
    const float total = (upper ? high : low) + __shfl_xor_sync(ALL, upper ? low : high, 16 + 2);
    const int diagonal = 8 * (2 * (t % 2) + t / 2) - 16 + (2 * t - g + 8) % 8;
    if (diagonal >= first && diagonal <= last) sums.add(entry + diagonal, total);
}

// Add the score gradients of a key block and a row block of queries to the sums of their entries, of which vector m
// begins at starts[m]. Runs of consecutive codes on both sides share entries along diagonals.
__device__ __forceinline__ void add_bias_gradient(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients, const int* starts,
    const Side& keys, uint32_t key_runs, const Side& queries, uint32_t query_runs, const float (&values)[2][4],
    const Sums& sums) {
    if (!keys.is_cls && !queries.is_cls) {
        if (keys.vector != queries.vector || !gradients.bias[keys.vector]) return;
        if (__popc(key_runs) * __popc(query_runs) <= MOST_RUN_PAIRS) {
            const int shift = starts[keys.vector] + arguments.bias[keys.vector].code_offset;
            const int row = thread_index() % WARP / 4, column = 2 * (thread_index() % 4);
            if (__popc(key_runs) * __popc(query_runs) == 1) {
                const int entry = queries.code[0] - keys.code[0] + shift;
                return add_diagonals(values, 1 - keys.count, queries.count - 1, sums, entry);
            }
#pragma unroll 1
            for (uint32_t rows = key_runs; rows; rows &= rows - 1) {
                const int key = first_run(rows), key_end = next_run(rows, keys.count);
#pragma unroll 1
                for (uint32_t columns = query_runs; columns; columns &= columns - 1) {
                    const int query = first_run(columns), query_end = next_run(columns, queries.count);
                    float inside[2][4];
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const int r = row + i % 4 / 2 * 8, c = column + i / 4 * 8 + i % 2;
                        const bool within = r >= key && r < key_end && c >= query && c < query_end;
                        inside[i / 4][i % 4] = within ? values[i / 4][i % 4] : 0.f;
                    }
                    const int entry = queries.code[query] - keys.code[key] + shift - (query - key);
                    add_diagonals(inside, query - key_end + 1, query_end - 1 - key, sums, entry);
                }
            }
            return;
        }
    }
    visit_entries(arguments, starts, keys, queries, [&](int n, int i, int, int entry) {
        if (values[n][i] != 0.f) sums.add(entry, values[n][i]);
    });
}

}  // namespace onepeace_fast

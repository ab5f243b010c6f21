// The bias of scores in base 2, and which entry of its modality's vector a pair of a query and a key takes.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include "block_difference.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"

namespace onepeace_fast {

constexpr float LOG2_E = 1.4426950408889634f;

// First and last of some integers.
struct Range {
    int first;
    int last;

    __device__ __forceinline__ void include(const Range& other) {
        first = min(first, other.first);
        last = max(last, other.last);
    }

    __device__ __forceinline__ void include(int one) { include(Range{one, one}); }

    // Includes those of all lanes of the warp.
    __device__ __forceinline__ void include_lanes() {
        for (int step = WARP / 2; step > 0; step /= 2) {
            include({__shfl_xor_sync(0xffffffff, first, step), __shfl_xor_sync(0xffffffff, last, step)});
        }
    }
};

// The vector that pairs of tokens of a modality have, where they have one: a single one is that of all pairs.
__device__ __forceinline__ int vector_of(const RelativeBiasAttention& arguments, int modality) {
    return arguments.bias_vectors == 1 ? 0 : modality;
}

enum ClsEntry { CLS_AS_QUERY, CLS_AS_KEY, CLS_AS_BOTH };  // of a vector's last CLS_ENTRIES

// Of a dense array of a type.
__device__ __forceinline__ float load_element(const void* data, ElementType type, int64_t index) {
    if (type == FLOAT32) return static_cast<const float*>(data)[index];
    if (type == FLOAT16) return to_float(static_cast<const float16*>(data)[index]);
    return to_float(static_cast<const bfloat16*>(data)[index]);
}

// In base 2.
__device__ __forceinline__ float load_entry(const BiasVector& vector, int head, int entry) {
    return LOG2_E * load_element(vector.data, vector.type, head * vector.head_stride + entry * vector.entry_stride);
}

// The scores of a warp, 16 queries in rows by KEYS keys, are counted in units of the scale and start from their bias,
// to which the matrix product adds the rest. What follows gives a thread's accumulators that start.

// For any codes, query_code [BLOCK_ROWS] and key_code [KEYS]: put(score, entry) of each pair.
template <int KEYS, typename Put>
__device__ __forceinline__ void visit_pairs(
    float (&scores)[KEYS / 8][4], const int* query_code, const int* key_code, Put put) {
    const int lane = thread_index() % WARP, row = lane / 4, column = 2 * (lane % 4);
    const int first = query_code[row], second = query_code[row + 8];
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
        const int left = key_code[8 * n + column], right = key_code[8 * n + column + 1];
        put(scores[n][0], first - left);
        put(scores[n][1], first - right);
        put(scores[n][2], second - left);
        put(scores[n][3], second - right);
    }
}

// For runs of keys, of which key_code has the first codes; of the run of queries, `entries` is where its first code
// minus 0 has its entry. Rows that a run lacks read up to BLOCK_ROWS - 1 entries too far, on either side.
template <int KEYS>
__device__ __forceinline__ void start_runs(float (&scores)[KEYS / 8][4], const float* entries, const int* key_code) {
    entries += lane_distance(thread_index() % WARP);
#pragma unroll
    for (int j = 0; j < KEYS / BLOCK_ROWS; ++j) {
        const float* entry = entries - key_code[BLOCK_ROWS * j];
        float of_diagonal[DIAGONALS];
#pragma unroll
        for (int d = 0; d < DIAGONALS; ++d) of_diagonal[d] = entry[diagonal_distance(d)];
#pragma unroll
        for (int i = 0; i < 8; ++i) scores[2 * j + i / 4][i % 4] = of_diagonal[diagonal(i / 4, i % 4)];
    }
}

// For a bias of each of a thread's two rows.
template <int KEYS>
__device__ __forceinline__ void start_rows(float (&scores)[KEYS / 8][4], float first, float second) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
        scores[n][0] = scores[n][1] = first;
        scores[n][2] = scores[n][3] = second;
    }
}

// For CLS keys of vectors key_vector [KEYS]; each of a thread's two rows has a bias with CLS of its own vector.
template <int KEYS>
__device__ __forceinline__ void start_cls(
    float (&scores)[KEYS / 8][4], const int* key_vector, int first, int second, float first_bias,
    float second_bias) {
    const int column = 2 * (thread_index() % 4);
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
        const int left = key_vector[8 * n + column], right = key_vector[8 * n + column + 1];
        scores[n][0] = left == first ? first_bias : 0.f;
        scores[n][1] = right == first ? first_bias : 0.f;
        scores[n][2] = left == second ? second_bias : 0.f;
        scores[n][3] = right == second ? second_bias : 0.f;
    }
}

// The keys or the queries of a row block.
struct Side {
    const int* code;  // [BLOCK_ROWS]; of CLS rows: their vector
    int vector;       // of body rows
    int count;
    bool is_cls;
};

// The entry of one pair, or -1 where it has no bias; entries are counted through all vectors, of which vector m begins
// at starts[m].
__device__ __forceinline__ int find_entry(
    const RelativeBiasAttention& arguments, const int* starts, const Side& keys, int key, const Side& queries,
    int query) {
    const int key_vector = keys.is_cls ? keys.code[key] : keys.vector;
    const int vector = queries.is_cls ? queries.code[query] : queries.vector;
    if (vector != key_vector) return -1;
    const int entries = arguments.bias[vector].entries, offset = arguments.bias[vector].code_offset;
    if (!keys.is_cls && !queries.is_cls) return starts[vector] + queries.code[query] - keys.code[key] + offset;
    const ClsEntry entry = !queries.is_cls ? CLS_AS_KEY : keys.is_cls ? CLS_AS_BOTH : CLS_AS_QUERY;
    return starts[vector] + entries - CLS_ENTRIES + entry;
}

// visit(n, i, vector, entry) for those of a thread's values [n][i] whose pair has a bias: accumulators of 16 keys, in
// rows, by 16 queries. The bias and its gradient see the same pairs.
template <typename Visit>
__device__ __forceinline__ void visit_entries(
    const RelativeBiasAttention& arguments, const int* starts, const Side& keys, const Side& queries, Visit visit) {
    const int lane = thread_index() % WARP, row = lane / 4, column = 2 * (lane % 4);
    if (!keys.is_cls && !queries.is_cls) {
        if (keys.vector != queries.vector) return;
        const int shift = starts[keys.vector] + arguments.bias[keys.vector].code_offset;
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int key = keys.code[row + 8 * below] - shift;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n = i / 2, right = i % 2;
                visit(n, 2 * below + right, keys.vector, queries.code[8 * n + column + right] - key);
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int n = i / 4, key = row + i % 4 / 2 * 8, query = 8 * n + column + i % 2;
        const int entry = find_entry(arguments, starts, keys, key, queries, query);
        if (entry >= 0) visit(n, i % 4, keys.is_cls ? keys.code[key] : keys.vector, entry);
    }
}

}  // namespace onepeace_fast

// The bias of scores in base 2, and which entry of its modality's vector a pair of a query and a key takes.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

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

    // Includes those of all lanes of the warp.
    __device__ __forceinline__ void include_lanes() {
        for (int step = WARP / 2; step > 0; step /= 2) {
            include({__shfl_xor_sync(0xffffffff, first, step), __shfl_xor_sync(0xffffffff, last, step)});
        }
    }
};

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

// scores = scale * scores + bias: a thread's accumulators of 16 queries, in rows, by KEYS keys, whose codes are
// query_code [BLOCK_ROWS] and key_code [KEYS].
template <int KEYS, typename Entry>
__device__ __forceinline__ void add_bias(
    float (&scores)[KEYS / 8][4], float scale, const int* query_code, const int* key_code, int shift, Entry entry) {
    const int lane = thread_index() % WARP, row = lane / 4, column = 2 * (lane % 4);
    const int first = query_code[row] + shift, second = query_code[row + 8] + shift;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
        const int left = key_code[8 * n + column], right = key_code[8 * n + column + 1];
        scores[n][0] = scores[n][0] * scale + entry(first - left);
        scores[n][1] = scores[n][1] * scale + entry(first - right);
        scores[n][2] = scores[n][2] * scale + entry(second - left);
        scores[n][3] = scores[n][3] * scale + entry(second - right);
    }
}

// scores = scale * scores + a bias for each row.
template <int KEYS>
__device__ __forceinline__ void add_row_bias(float (&scores)[KEYS / 8][4], float scale, float first, float second) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
        scores[n][0] = scores[n][0] * scale + first;
        scores[n][1] = scores[n][1] * scale + first;
        scores[n][2] = scores[n][2] * scale + second;
        scores[n][3] = scores[n][3] * scale + second;
    }
}

// scores = scale * scores + bias, for CLS keys of modalities key_modality [KEYS]; each of a thread's two rows has a
// bias with CLS of its own modality.
template <int KEYS>
__device__ __forceinline__ void add_cls_bias(
    float (&scores)[KEYS / 8][4], float scale, const int* key_modality, int first, int second, float first_bias,
    float second_bias) {
    const int column = 2 * (thread_index() % 4);
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
        const int left = key_modality[8 * n + column], right = key_modality[8 * n + column + 1];
        scores[n][0] = scores[n][0] * scale + (left == first ? first_bias : 0.f);
        scores[n][1] = scores[n][1] * scale + (right == first ? first_bias : 0.f);
        scores[n][2] = scores[n][2] * scale + (left == second ? second_bias : 0.f);
        scores[n][3] = scores[n][3] * scale + (right == second ? second_bias : 0.f);
    }
}

// The keys or the queries of a row block.
struct Side {
    const int* code;  // [BLOCK_ROWS]; of CLS rows: their modality
    int modality;     // of body rows
    int count;
    bool is_cls;
};

// The entry of one pair, or -1 where it has no bias; entries are counted through all vectors, of which vector m begins
// at starts[m].
__device__ __forceinline__ int find_entry(
    const RelativeBiasAttention& arguments, const int* starts, const Side& keys, int key, const Side& queries,
    int query) {
    const int key_modality = keys.is_cls ? keys.code[key] : keys.modality;
    const int modality = queries.is_cls ? queries.code[query] : queries.modality;
    if (modality != key_modality) return -1;
    const int entries = arguments.bias[modality].entries, offset = arguments.bias[modality].code_offset;
    if (!keys.is_cls && !queries.is_cls) return starts[modality] + queries.code[query] - keys.code[key] + offset;
    const ClsEntry entry = !queries.is_cls ? CLS_AS_KEY : keys.is_cls ? CLS_AS_BOTH : CLS_AS_QUERY;
    return starts[modality] + entries - CLS_ENTRIES + entry;
}

// visit(n, i, modality, entry) for those of a thread's values [n][i] whose pair has a bias: accumulators of 16 keys, in
// rows, by 16 queries. The bias and its gradient see the same pairs.
template <typename Visit>
__device__ __forceinline__ void visit_entries(
    const RelativeBiasAttention& arguments, const int* starts, const Side& keys, const Side& queries, Visit visit) {
    const int lane = thread_index() % WARP, row = lane / 4, column = 2 * (lane % 4);
    if (!keys.is_cls && !queries.is_cls) {
        if (keys.modality != queries.modality) return;
        const int shift = starts[keys.modality] + arguments.bias[keys.modality].code_offset;
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int key = keys.code[row + 8 * below] - shift;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n = i / 2, right = i % 2;
                visit(n, 2 * below + right, keys.modality, queries.code[8 * n + column + right] - key);
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int n = i / 4, key = row + i % 4 / 2 * 8, query = 8 * n + column + i % 2;
        const int entry = find_entry(arguments, starts, keys, key, queries, query);
        if (entry >= 0) visit(n, i % 4, keys.is_cls ? keys.code[key] : keys.modality, entry);
    }
}

}  // namespace onepeace_fast

// The bias of scores in base 2. Entries of the vectors stand in shared memory: all of them where they fit, else, window
// by window, those that a tile of keys can meet.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

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

    // Those of all lanes of the warp.
    __device__ __forceinline__ void include_lanes() {
        for (int step = WARP / 2; step > 0; step /= 2) {
            include({__shfl_xor_sync(0xffffffff, first, step), __shfl_xor_sync(0xffffffff, last, step)});
        }
    }
};

enum ClsEntry { CLS_AS_QUERY, CLS_AS_KEY, CLS_AS_BOTH };

__device__ __forceinline__ float load_element(const void* data, ElementType type, int64_t index) {
    if (type == FLOAT32) return static_cast<const float*>(data)[index];
    if (type == FLOAT16) return to_float(static_cast<const float16*>(data)[index]);
    return to_float(static_cast<const bfloat16*>(data)[index]);
}

__device__ __forceinline__ float load_entry(const BiasVector& vector, int head, int entry) {
    return LOG2_E * load_element(vector.data, vector.type, head * vector.head_stride + entry * vector.entry_stride);
}

// scores = scale * scores + bias, for queries and keys whose codes are given: a thread's accumulators of KEYS keys.
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

// scores = scale * scores + bias, for CLS keys whose modalities are given; each of a thread's two rows has a bias with
// CLS of its own modality.
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

}  // namespace onepeace_fast

// The gradient of vectors in code form from pairs of row blocks whose codes are runs: to which entries such a pair adds
// depends on the difference of the two first codes alone. Each difference has float sums in the form of a warp's
// accumulators, their 8 values folded to 6 by diagonal, over all samples of a thread block; at its end they are added
// up along the diagonals. A lane adds to what is its own, in the order of the walk, and no two warps ever add to one
// difference between two barriers: the key blocks of a walk differ, so of one row block of queries all differences do.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>

#include "bias.cuh"
#include "block_difference.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"

namespace onepeace_fast {

// The sums of one block difference, by diagonal; the accumulators have keys in rows and queries in columns.
struct alignas(16) DifferenceSums {
    float4 four[WARP];
    float2 two[WARP];

    __device__ __forceinline__ void add(const float (&values)[2][4]) {
        const int lane = thread_index() % WARP;
        const float4 before = four[lane];
        const float2 rest = two[lane];
        four[lane] = {
            before.x + values[1][0], before.y + values[1][1], before.z + (values[0][0] + values[1][2]),
            before.w + (values[0][1] + values[1][3])};
        two[lane] = {rest.x + values[0][2], rest.y + values[0][3]};
    }

    // The sum along the diagonal of pairs whose query is so many rows further than their key.
    __device__ __forceinline__ float along(int distance) const {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < DIAGONALS; ++i) {
#pragma unroll 1
            for (int t = 0; t < 4; ++t) {
                const int g = 2 * t - distance - diagonal_distance(i);
                if (g < 0 || g >= 8) continue;
                const int lane = 4 * g + t;
                sum += i < 4 ? reinterpret_cast<const float*>(four + lane)[i % 4]
                             : reinterpret_cast<const float*>(two + lane)[i % 2];
            }
        }
        return sum;
    }
};

// What codes of a row block say, in one access to shared memory.
struct alignas(16) Run {
    int vector;    // of a whole row block whose codes are a run; negative: it is none
    int first;     // the first code; of queries, the entry of that and a key's code of zero
    int place;     // of keys and queries whose pairs have sums by difference: theirs less the keys' is their number
    int order;     // of keys the highest, of queries the lowest; 0 without an order
};

constexpr Run NO_RUN{-1, 0, -1, 0};
constexpr int PLACES = 1 << 20;  // of a modality: more than it has differences or row blocks

// Which block differences have sums, in shared memory. The first codes of a modality's row blocks are `stride` apart,
// as in the first sample that has two; where another sample's are not, or there is no room, its pairs have none. Of
// modalities that share a vector only the first one's have: two row blocks of several may have the same codes. Pairs of
// queries with other tokens' keys have none.
struct Differences {
    int taken;
    int stride[MAX_MODALITIES];  // 0: not known yet; negative: there is no room
    int first[MAX_MODALITIES];   // of its differences, among all
    int equal[MAX_MODALITIES];   // that of two equal codes
    int count[MAX_MODALITIES];
    // Of the sample at hand.
    int step[MAX_MODALITIES];    // stride, or 0
    int origin[MAX_MODALITIES];  // the first code

    __device__ void begin() {
        for (int m = 0; m < MAX_MODALITIES; ++m) stride[m] = count[m] = 0;
        taken = 0;
    }

    // By one warp, behind a barrier after the sample was read.
    __device__ void read_sample(
        const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients, const Sample& sample,
        int capacity) {
        const int m = thread_index() % WARP;
        const PackedRows &queries = arguments.queries, &keys = arguments.keys;
        const bool is_self = queries.code == keys.code && queries.cu_seqlens == keys.cu_seqlens;
        if (m < arguments.bias_vectors) {
            const int* code = queries.code + sample.first[m];
            origin[m] = sample.body[m] ? code[0] : 0;
            step[m] = !is_self ? 0 : sample.body[m] > BLOCK_ROWS ? code[BLOCK_ROWS] - origin[m] : stride[m];
        }
        __syncwarp();  // every modality's step is there
        if (m == 0) {
#pragma unroll 1
            for (int i = 0; i < arguments.bias_vectors; ++i) {
                if (stride[i] == 0 && step[i] > 0) take(arguments.bias[i], gradients.bias[i], i, capacity);
                if (step[i] != stride[i]) step[i] = 0;
            }
        }
    }

    // What a row block's codes [BLOCK_ROWS] say, as keys. Only row blocks that are as many strides behind the first as
    // row blocks have a place, so no two have the same. By all lanes of a warp.
    __device__ __forceinline__ Run find_run(
        const RelativeBiasAttention& arguments, const RowBlock& row_block, const int* code) const {
        const int m = row_block.modality, first = code[0];
        if (!arguments.bias_vectors || m == arguments.modalities) return NO_RUN;
        if (!are_runs<BLOCK_ROWS>(code, row_block.count)) return NO_RUN;
        const int place = row_block.first / BLOCK_ROWS;
        const bool has_place = m < arguments.bias_vectors && step[m] > 0 && first == origin[m] + place * step[m];
        const int vector = row_block.count == BLOCK_ROWS ? vector_of(arguments, m) : -1;
        return {vector, first, has_place ? m * PLACES + place : -1, 0};
    }

private:
    // Room for all differences of codes that find an entry, if there is.
    __device__ void take(const BiasVector& vector, const void* gradient, int m, int capacity) {
        const int entries = vector.entries - CLS_ENTRIES, offset = vector.code_offset;
        stride[m] = -1;
        if (!gradient || offset < 0 || offset >= entries) return;
        const int before = offset / step[m], all = before + (entries - 1 - offset) / step[m] + 1;
        if (taken + all > capacity) return;
        stride[m] = step[m];
        first[m] = taken;
        equal[m] = taken + before;
        count[m] = all;
        taken += all;
    }
};

// What the differences of a modality add to the entry of a code difference.
__device__ __forceinline__ float add_differences(
    const Differences& differences, const DifferenceSums* sums, int m, int distance) {
    const int stride = differences.stride[m], first = differences.first[m];
    const int beyond = distance + stride * (differences.equal[m] - first);  // that of the first difference
    float sum = 0.f;
#pragma unroll 1
    for (int i = max(0, ceil_div(beyond - BLOCK_ROWS + 1, stride)); i < differences.count[m]; ++i) {
        if (beyond - stride * i <= -BLOCK_ROWS) break;
        sum += sums[first + i].along(beyond - stride * i);
    }
    return sum;
}

}  // namespace onepeace_fast

// Which entry of its modality's vector a pair of a query and a key takes, in blocks of 16 keys by 16 queries whose
// values stand as accumulators do, keys in rows: the bias and its gradient see the same pairs.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include "bias.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"

namespace onepeace_fast {

// The keys or the queries of a block.
struct Side {
    const int* code;  // of CLS rows: their modality
    int modality;     // of body rows
    int count;
    bool is_cls;
};

// The entry of one pair, or -1 where it has no bias; entries are counted through all vectors, which begin at `starts`.
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

// visit(n, i, modality, entry) for those of a thread's values [n][i] whose pair has a bias.
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

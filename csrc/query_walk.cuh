// The walk of a thread block through the keys of its sample, a warp for 16 or 32 queries: what the forward pass and the
// row sums of the backward pass share. Keys and values have two stages in shared memory. Over time:
//
//                      | tile i                                                  | tile i + 1
//     copies           | tile i + 1 into the other stage (cp.async) ........ wait | tile i + 2 ...
//     a warp   barrier | bias   | q k^T  | windows | mask | exp2 | p v  wait | barrier | q k^T ...
//     unit             | shared | tensor | global  | ALU  | MUFU | tensor
//
// The barrier says that this tile has arrived for all, and that nobody reads the one before, whose stage the next
// copies overwrite. Between barriers warps run apart: the tensor cores work for one while another computes
// exponentials. Windows, each loaded by all warps between two more barriers, are only those of vectors that shared
// memory does not hold.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cmath>

#include "bias.cuh"
#include "forward_memory.cuh"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

// scores += queries keys^T of a warp: queries [ROW_BLOCKS * BLOCK_ROWS, HEAD_DIM], keys [COLUMNS, HEAD_DIM], both in
// shared memory.
template <int COLUMNS, int HEAD_DIM, int ROW_BLOCKS, typename T>
__device__ __forceinline__ void multiply_keys(
    float (&scores)[ROW_BLOCKS][COLUMNS / 8][4], const T* queries, const T* keys) {
    const int lane = thread_index() % WARP;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k) {
        uint32_t a[ROW_BLOCKS][4];
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS; ++i) left_operand<HEAD_DIM>(a[i], queries, lane, i, k);
#pragma unroll
        for (int j = 0; j < COLUMNS / 16; ++j) {
            uint32_t b[4];
            transposed_right_operand<HEAD_DIM>(b, keys, lane, j, k);
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS; ++i) {
                mma<T>(scores[i][2 * j], a[i], b[0], b[1]);
                mma<T>(scores[i][2 * j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// Of keys past the last.
template <int COLUMNS>
__device__ __forceinline__ void mask_keys(float (&scores)[COLUMNS / 8][4], int count) {
    const int column = 2 * (thread_index() % 4);
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (8 * n + column + i % 2 >= count) scores[n][i] = -INFINITY;
        }
    }
}

// Of keys whose order is above a query's.
template <int COLUMNS, typename T, typename Launch, bool WINDOWED>
__device__ __forceinline__ void mask_later(
    float (&scores)[COLUMNS / 8][4], const Forward<T, Launch, WINDOWED>& forward, int stage, int query_block) {
    auto& shared = forward.shared;
    const int warp = thread_index() / WARP, row = thread_index() % WARP / 4, column = 2 * (thread_index() % 4);
    if (shared.key_orders[stage].last <= shared.query_orders[warp].first) return;
    const int first = shared.query_order[query_block][row], second = shared.query_order[query_block][row + 8];
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) {
        for (int right = 0; right < 2; ++right) {
            const int order = shared.key_order[stage][8 * n + column + right];
            if (order > first) scores[n][right] = -INFINITY;
            if (order > second) scores[n][2 + right] = -INFINITY;
        }
    }
}

// Start a row block's scores from their bias, but for the entries of a windowed vector.
template <int COLUMNS, typename T, typename Launch, bool WINDOWED>
__device__ __forceinline__ void start_scores(
    float (&scores)[COLUMNS / 8][4], const Forward<T, Launch, WINDOWED>& forward, int stage, int query_block) {
    const RelativeBiasAttention& arguments = forward.arguments;
    auto& shared = forward.shared;
    const int row = thread_index() % WARP / 4;
    const int mine = shared.query_rows[query_block].modality, modality = shared.key_rows[stage].modality;
    const int* query_code = shared.query_code[query_block];
    const int* key_code = shared.key_code[stage];
    const bool is_cls = mine == arguments.modalities, share = arguments.bias_vectors == 1;
    if (COLUMNS == BLOCK_ROWS && arguments.bias_vectors) {
        const int first = is_cls ? query_code[row] : vector_of(arguments, mine);
        const int second = is_cls ? query_code[row + 8] : first;
        const ClsEntry entry = is_cls ? CLS_AS_BOTH : CLS_AS_KEY;
        start_cls<COLUMNS>(scores, key_code, first, second, shared.cls[first][entry], shared.cls[second][entry]);
    } else if ((share ? is_cls : mine != modality) || WINDOWED || !arguments.bias_vectors) {
        const int vector = vector_of(arguments, modality);
        const float bias = is_cls && arguments.bias_vectors ? shared.cls[vector][CLS_AS_QUERY] : 0.f;
        start_rows<COLUMNS>(
            scores, !is_cls || query_code[row] == vector ? bias : 0.f,
            !is_cls || query_code[row + 8] == vector ? bias : 0.f);
    } else if (shared.query_is_run[query_block] && shared.keys_are_runs[stage]) {
        start_runs<COLUMNS>(scores, shared.bias() + query_code[0], key_code);
    } else {
        const float* entries = shared.bias();
        visit_pairs<COLUMNS>(
            scores, query_code, key_code, [&](float& score, int entry) { score = entries[entry]; });
    }
}

// Add the entries of a windowed vector; all warps of the thread block load, those with queries of the modality add.
template <int COLUMNS, typename T, typename Launch>
__device__ __forceinline__ void add_windows(
    float (&scores)[COLUMNS / 8][4], const Forward<T, Launch, true>& forward, int stage, int capacity) {
    auto& shared = forward.shared;
    const int warp = thread_index() / WARP;
    const RowBlock& mine = shared.query_rows[warp];
    const float* entries = forward.shared.bias();
    const int vector = vector_of(forward.arguments, shared.key_rows[stage].modality);
    const Range range = forward.find_entries(stage, vector);
    for (int first = range.first; first <= range.last; first += capacity) {
        const int count = min(capacity, range.last - first + 1);
        if (first > range.first) __syncthreads();  // nobody reads the window before
        forward.load_window(vector, first, count);
        __syncthreads();
        if (shared.attends[stage][warp] && forward.has_vector(mine, vector)) {
            visit_pairs<COLUMNS>(
                scores, shared.query_code[warp], shared.key_code[stage], [&](float& score, int entry) {
                    score += entry >= first && entry < first + count ? entries[entry - first] : 0.f;
                });
        }
    }
}

// QueryRows::attend of a tile of keys and its scores, in units of score_scale. By all warps: those without queries that
// see a key only load windows.
template <int COLUMNS, typename QueryRows, typename T, typename Launch, bool WINDOWED>
__device__ __forceinline__ void attend_tile(
    QueryRows& rows, const Forward<T, Launch, WINDOWED>& forward, int stage, int bias_capacity) {
    constexpr int ROW_BLOCKS = Launch::ROW_BLOCKS;
    auto& shared = forward.shared;
    float scores[ROW_BLOCKS][COLUMNS / 8][4];
    if (shared.attends[stage][thread_index() / WARP]) {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS; ++i) {
            start_scores<COLUMNS>(scores[i], forward, stage, forward.first_query_block() + i);
        }
        multiply_keys<COLUMNS, Launch::HEAD_DIM>(
            scores, shared.queries[forward.first_query_block()], shared.keys[stage]);
    }
    if constexpr (WINDOWED && COLUMNS == Launch::KEYS) {
        add_windows<COLUMNS>(scores[0], forward, stage, bias_capacity);
    }
    if (shared.attends[stage][thread_index() / WARP]) {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS; ++i) {
            if (shared.keys_are_whole[stage]) break;
            mask_keys<COLUMNS>(scores[i], shared.key_rows[stage].count);
            if (forward.has_order()) mask_later<COLUMNS>(scores[i], forward, stage, forward.first_query_block() + i);
        }
        rows.template attend<COLUMNS>(scores, forward, stage);
    }
}

// By a thread block whose sample is read: its queries, ROW_BLOCKS row blocks a warp at a time, attend to all keys of the
// sample. QueryRows is OutputRows of the forward pass or RowSums of the backward pass: QueryRows(forward, more...)
// begins when queries and their keys are being copied, attend takes in a tile, and finish(rows) ends them.
template <typename QueryRows, typename T, typename Launch, bool WINDOWED, typename Finish, typename... More>
__device__ __forceinline__ void walk_queries(
    const Forward<T, Launch, WINDOWED>& forward, int bias_capacity, Finish finish, const More&... more) {
    constexpr int ROW_BLOCKS = Launch::ROW_BLOCKS, KEYS = Launch::KEYS;
    const RelativeBiasAttention& arguments = forward.arguments;
    auto& shared = forward.shared;
    forward.describe_bias();
    if (thread_index() == 0) shared.query_tile = blockIdx.x;
    __syncthreads();
    while (true) {
        // What the loop over keys does not need stays in shared memory.
        const int row_blocks = shared.sample.row_blocks, query_tiles = ceil_div(row_blocks, Launch::QUERY_BLOCKS);
        const int query_tile = shared.query_tile, warps = ceil_div(row_blocks, ROW_BLOCKS);
        if (query_tile >= query_tiles) break;
        const int first_row_block = query_tile * warps / query_tiles * ROW_BLOCKS;
        const int end_row_block = min((query_tile + 1) * warps / query_tiles * ROW_BLOCKS, row_blocks);
        const int mine = first_row_block + forward.first_query_block();
        const bool has_keys = shared.key_sample.key_tiles > 0;
        if (has_keys) forward.load_keys(0, find_row_block(shared.key_sample, arguments.modalities, KEYS, 0));
        if (mine < end_row_block) {
            forward.load_queries(mine, end_row_block);
        } else if (thread_index() % WARP == 0) {
            for (int i = 0; i < ROW_BLOCKS; ++i) forward.set_query_rows(i, {0, 0, 0});
        }
        if (!WINDOWED) forward.load_whole_bias(first_row_block, end_row_block);
        QueryRows rows(forward, more...);
        // The last warp knows the orders of all queries; without keys, everybody has read which queries are next.
        if (forward.has_order() || !has_keys) __syncthreads();
        int stage = 0;
        for (bool has_next = has_keys; has_next; stage = 1 - stage) {
            cp_async_wait_all();
            forward.describe_keys(stage);
            __syncthreads();  // this tile is there, and nobody reads the one before, whose place the next one takes
            has_next = shared.next_key_rows[stage].count > 0;
            if (has_next) forward.load_keys(1 - stage, RowBlock(shared.next_key_rows[stage]));
            if (shared.key_rows[stage].modality == arguments.modalities) {
                attend_tile<BLOCK_ROWS>(rows, forward, stage, bias_capacity);
            } else {
                attend_tile<KEYS>(rows, forward, stage, bias_capacity);
            }
        }
        if (!has_keys) cp_async_wait_all();  // results take the place of queries
        if (shared.query_rows[forward.first_query_block()].count) finish(rows);
        if (thread_index() == 0) shared.query_tile += gridDim.x;
        __syncthreads();  // the next queries take the place of these keys and results
    }
}

}  // namespace onepeace_fast

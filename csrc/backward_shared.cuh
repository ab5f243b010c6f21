// What a thread block of the backward kernel holds in shared memory.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include "backward_workspace.cuh"
#include "bias.cuh"
#include "difference_sums.cuh"
#include "forward_memory.cuh"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

// Of the key block that is spread, and a tile of queries.
struct alignas(16) SpreadScores {
    float probabilities[BLOCK_ROWS][TILE + CHUNK];
    float gradients[BLOCK_ROWS][TILE + CHUNK];
};

template <typename T, typename Launch>
struct alignas(128) BackwardShared {
    static constexpr int HEAD_DIM = Launch::HEAD_DIM, VALUE_DIM = Launch::VALUE_DIM;
    static constexpr int WARPS = Launch::WARPS, KEY_BLOCKS = Launch::KEY_BLOCKS;

    T keys[KEY_BLOCKS * BLOCK_ROWS * HEAD_DIM];     // at the end of a walk their gradients
    T values[KEY_BLOCKS * BLOCK_ROWS * VALUE_DIM];  // at the end of a walk theirs
    T queries[STAGES][TILE * HEAD_DIM];
    T grad[STAGES][TILE * VALUE_DIM];
    T score_gradient[KEY_BLOCKS * BLOCK_ROWS * TILE];  // of a tile of queries, keys in rows
    float log_sum_exp[STAGES][TILE];               // in base 2; infinite past the last query
    float row_sums[STAGES][TILE];
    int query_order[STAGES][TILE];
    int key_order[KEY_BLOCKS * BLOCK_ROWS];
    int query_code[STAGES][TILE];  // of CLS queries: their vector
    int key_code[KEY_BLOCKS * BLOCK_ROWS];
    T spread_rows[BLOCK_ROWS * TILE];  // probabilities of the key block that is spread
    union {
        SpreadScores spread;                        // until the scores' gradient is complete
        T results[WARPS][BLOCK_ROWS * BLOCK_ROWS];  // from then on: gradients of queries on their way to memory
    };
    float partial_sums[WARPS][TILE];  // of probability times its gradient over a warp's keys
    float scale_sums[WARP];           // of row sums, for each row of a tile
    uint32_t largest[WARPS];          // magnitude of a gradient of probabilities, of each warp
    RowBlock query_rows[STAGES][HALVES];
    RowBlock key_rows[KEY_BLOCKS];
    Range key_orders[KEY_BLOCKS];
    int seen_key_blocks[STAGES];  // of the walk, up to the last one of which a query of the tile sees a key
    int bias_start[MAX_MODALITIES];
    Run query_runs[STAGES][HALVES];
    Run key_runs[KEY_BLOCKS];
    Differences differences;
    Sample sample;
    Sample key_sample;
    int exponent;   // of the fixed point in which sums stand
    int is_finite;  // whether all gradients of scores have been so far
    // float bias[entries], int sums[2 * entries] follow, unless the vectors are large; then DifferenceSums.

    __device__ float* bias() { return reinterpret_cast<float*>(this + 1); }
};

// Every GPU that the kernels take holds the compact shape, and heads of 32 in the other.
static_assert(sizeof(BackwardShared<bfloat16, BackwardLaunch<32, 32, false>>) <= SMALLEST_SHARED_BYTES);
static_assert(sizeof(BackwardShared<bfloat16, BackwardLaunch<64, 64, true>>) <= SMALLEST_SHARED_BYTES);
static_assert(sizeof(BackwardShared<bfloat16, BackwardLaunch<96, 96, true>>) <= SMALLEST_SHARED_BYTES);
static_assert(sizeof(BackwardShared<bfloat16, BackwardLaunch<128, 64, true>>) <= SMALLEST_SHARED_BYTES);
static_assert(sizeof(BackwardShared<bfloat16, BackwardLaunch<128, 128, true>>) <= SMALLEST_SHARED_BYTES);

}  // namespace onepeace_fast

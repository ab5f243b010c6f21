// Flash attention backward over packed segments, with the gradient of the relative position bias. With p the
// probabilities, from the log-sum-exp of the forward pass, g the gradient of the output and c the head scale:
//
//     dv = c p^T g,  d_ij = g_i . v_j,  r_i = sum_j p_ij d_ij,  ds = c p (d - r),  dq = scale ds k,  dk = scale ds^T q
//
// dc is the sum of all r, and the gradient of a vector's entry the sum of ds over the pairs that take it.
//
// A thread block walks a group of samples of one head. Each warp holds the gradients of one or two key blocks, of 16
// keys each, in registers, while queries come by in tiles of 32; warps exchange their shares of r, and ds for dq,
// through shared memory. Where a sample has more keys than warps hold, or its keys are split among thread blocks, r is
// computed before by backward_row_sums.cuh, and dq is added up in the workspace. Nothing depends on the order in which
// warps or thread blocks run.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cmath>

#include "backward_memory.cuh"
#include "backward_workspace.cuh"
#include "bias_gradient.cuh"
#include "entry_sums.cuh"
#include "gradient_rows.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"
#include "spread_key_block.cuh"
#include "tile.cuh"

namespace onepeace_fast {

// Of a warp: its key blocks, keys in rows, by the halves of a tile of queries, as accumulators.
template <typename Launch>
using Pairs = float[Launch::SLOTS][HALVES][2][4];

// Of a warp: the gradient of its keys or values, of which a head has SIZE.
template <typename Launch, int SIZE>
using KeyRows = float[Launch::SLOTS][SIZE / 8][4];

// The key block of a slot of a warp, counted from the walk's first; past the last one where there are fewer.
template <typename Launch>
__device__ __forceinline__ int own_key_block(int warp, int slot) {
    return slot * Launch::WARPS + warp;
}

// pairs += keys queries^T: keys [key_blocks, BLOCK_ROWS, SIZE], queries [TILE, SIZE], both in shared memory.
template <typename Launch, int SIZE, typename T>
__device__ __forceinline__ void multiply(
    int warp, Pairs<Launch>& pairs, const T* keys, const T* queries, int key_blocks) {
    const int lane = thread_index() % WARP;
#pragma unroll
    for (int k = 0; k < SIZE / 16; ++k) {
        uint32_t b[HALVES][4];
#pragma unroll
        for (int half = 0; half < HALVES; ++half) transposed_right_operand<SIZE>(b[half], queries, lane, half, k);
#pragma unroll
        for (int slot = 0; slot < Launch::SLOTS; ++slot) {
            const int key_block = own_key_block<Launch>(warp, slot);
            if (key_block >= key_blocks) continue;
            uint32_t a[4];
            left_operand<SIZE>(a, keys, lane, key_block, k);
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                mma<T>(pairs[slot][half][0], a, b[half][0], b[half][1]);
                mma<T>(pairs[slot][half][1], a, b[half][2], b[half][3]);
            }
        }
    }
}

// rows += pairs queries: queries [TILE, SIZE] in shared memory.
template <typename Launch, int SIZE, typename T>
__device__ __forceinline__ void accumulate(
    int warp, KeyRows<Launch, SIZE>& rows, const Pairs<Launch>& pairs, const T* queries, int key_blocks) {
    constexpr int SLOTS = Launch::SLOTS;
    const int lane = thread_index() % WARP;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
        uint32_t a[SLOTS][4];
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) left_operand<T>(a[slot], pairs[slot][half][0], pairs[slot][half][1]);
#pragma unroll
        for (int j = 0; j < SIZE / 16; ++j) {
            uint32_t b[4];
            right_operand<SIZE>(b, queries, lane, half, j);
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                if (own_key_block<Launch>(warp, slot) >= key_blocks) continue;
                mma<T>(rows[slot][2 * j], a[slot], b[0], b[1]);
                mma<T>(rows[slot][2 * j + 1], a[slot], b[2], b[3]);
            }
        }
    }
}

// Leave with the other warps what this one's keys add to each query's sum of probability times gradient. Eight lanes
// have the same queries: in three steps each gives half of its sums and gets half, until it has one.
template <typename T, typename Launch, bool LARGE>
__device__ __forceinline__ void share_sums(
    const Backward<T, Launch, LARGE>& backward, const Pairs<Launch>& probabilities, const Pairs<Launch>& gradients) {
    const int warp = thread_index() / WARP, lane = thread_index() % WARP;
    float sums[HALVES * 4] = {};  // of queries 8 (i / 2) + 2 (lane % 4) + i % 2
#pragma unroll
    for (int slot = 0; slot < Launch::SLOTS; ++slot) {
#pragma unroll
        for (int i = 0; i < HALVES * 8; ++i) {
            sums[i / 4 * 2 + i % 2] +=
                probabilities[slot][i / 8][i / 4 % 2][i % 4] * gradients[slot][i / 8][i / 4 % 2][i % 4];
        }
    }
#pragma unroll
    for (int step = 16, count = HALVES * 2; step >= 4; step /= 2, count /= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const float given = upper ? sums[i] : sums[count + i], kept = upper ? sums[count + i] : sums[i];
            sums[i] = kept + __shfl_xor_sync(0xffffffff, given, step);
        }
    }
    backward.shared.partial_sums[warp][lane / 8 * 8 + 2 * (lane % 4) + lane / 4 % 2] = sums[0];
}

// Leave with the other warps the largest gradient of this one's probabilities. One of a probability that is not finite
// makes its row's sum not finite.
template <typename T, typename Launch, bool LARGE>
__device__ __forceinline__ void share_largest(
    const Backward<T, Launch, LARGE>& backward, const Pairs<Launch>& gradients, uint32_t largest) {
    const int warp = thread_index() / WARP, lane = thread_index() % WARP;
#pragma unroll
    for (int i = 0; i < Launch::SLOTS * HALVES * 8; ++i) {
        largest = max(largest, magnitude(gradients[i / 8 / HALVES][i / 8 % HALVES][i / 4 % 2][i % 4]));
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        largest = max(largest, __shfl_xor_sync(0xffffffff, largest, step));
    }
    if (lane == 0) backward.shared.largest[warp] = largest;
}

// The sum of probability times gradient of a lane's query, over all keys of its sample; behind the barrier that follows
// share_sums. Of a sample that is walked whole; of others the kernel before found it.
template <typename T, typename Launch, bool LARGE>
__device__ __forceinline__ float find_row_sum(
    const SpreadKeyBlock<T, Launch, LARGE>& spread, int stage, int key_blocks, bool is_whole) {
    const auto& shared = spread.backward.shared;
    const int lane = thread_index() % WARP;
    if (!is_whole) return shared.row_sums[stage][lane];
    float sum = key_blocks > spread.KEY_BLOCK ? spread.row_sum() : 0.f;
    for (int warp = 0; warp < Launch::WARPS; ++warp) sum += shared.partial_sums[warp][lane];
    return sum;
}

// gradients = ds.
template <typename Launch>
__device__ __forceinline__ void differentiate(
    const Pairs<Launch>& probabilities, Pairs<Launch>& gradients, float row_sum, float head_scale) {
    const int lane = thread_index() % WARP;
#pragma unroll
    for (int i = 0; i < HALVES * 4; ++i) {
        const float mean = __shfl_sync(0xffffffff, head_scale * row_sum, i / 2 * 8 + 2 * (lane % 4) + i % 2);
#pragma unroll
        for (int j = 0; j < 2 * Launch::SLOTS; ++j) {
            const int slot = j / 2, element = j % 2 * 2 + i % 2;
            float& gradient = gradients[slot][i / 4][i / 2 % 2][element];
            gradient = probabilities[slot][i / 4][i / 2 % 2][element] * (head_scale * gradient - mean);
        }
    }
}

// Add ds of half a tile of queries to the sums of their block differences, or of their entries.
template <typename T, typename Launch, bool LARGE>
__device__ __forceinline__ void add_to_sums(
    int warp, const Backward<T, Launch, LARGE>& backward, const Pairs<Launch>& gradients, int stage, int half,
    int key_blocks, const Sums& sums) {
    auto& shared = backward.shared;
    const int query_place = shared.query_runs[stage][half].place;
#pragma unroll
    for (int slot = 0; slot < Launch::SLOTS; ++slot) {
        const int key_block = own_key_block<Launch>(warp, slot);
        if (key_block >= key_blocks) continue;
        const int key_place = shared.key_runs[key_block].place;
        if (min(query_place, key_place) >= 0) {
            // Of two modalities, whose pairs have no bias, they are further apart.
            const int index = query_place - key_place;
            if (index >= 0 && index < backward.workspace.differences) {
                backward.difference_sums()[index].add(gradients[slot][half]);
            }
        } else {
            const Side keys = backward.keys(key_block), queries = backward.queries(stage, half);
            // A lane for each row of the queries, and of the keys.
            const bool is_key = thread_index() % WARP >= BLOCK_ROWS;
            const uint32_t runs =
                find_run_starts(is_key ? keys.code : queries.code, is_key ? keys.count : queries.count);
            add_bias_gradient(
                backward.arguments, backward.gradients, shared.bias_start, keys, runs >> BLOCK_ROWS, queries,
                runs & 0xffff, gradients[slot][half], sums);
        }
    }
}

// Leave ds of this warp's keys in shared memory for the gradient of queries.
template <typename T, typename Launch, bool LARGE>
__device__ __forceinline__ void leave_score_gradient(
    int warp, const Backward<T, Launch, LARGE>& backward, const Pairs<Launch>& gradients, int key_blocks) {
    const int lane = thread_index() % WARP;
#pragma unroll
    for (int slot = 0; slot < Launch::SLOTS; ++slot) {
        const int key_block = own_key_block<Launch>(warp, slot);
        if (key_block >= key_blocks) continue;
#pragma unroll
        for (int i = 0; i < HALVES * 4; ++i) {
            const float* pair = &gradients[slot][i / 4][i / 2 % 2][i % 2 * 2];
            T* target = backward.shared.score_gradient + key_block * BLOCK_ROWS * TILE +
                        swizzled<TILE>(lane / 4 + i % 2 * 8, i / 2) + 2 * (lane % 4);
            *reinterpret_cast<uint32_t*>(target) = pack<T>(pair[0], pair[1]);
        }
    }
}

// dq of a tile: its 16 rows and columns are divided among the warps.
template <typename T, typename Launch, bool LARGE>
__device__ __forceinline__ void find_query_gradient(
    const Backward<T, Launch, LARGE>& backward, int stage, int key_blocks, bool is_whole, bool is_first) {
    constexpr int HEAD_DIM = Launch::HEAD_DIM;
    const auto& shared = backward.shared;
    const int lane = thread_index() % WARP;
#pragma unroll 1
    for (int i = thread_index() / WARP; i < HALVES * HEAD_DIM / 16; i += Launch::WARPS) {
        const int half = i % HALVES, j = i / HALVES;
        const T* left = shared.score_gradient +
                        swizzled<TILE>(lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2);
        float result[2][4] = {};
#pragma unroll 2
        for (int key_block = 0; key_block < key_blocks; ++key_block) {
            uint32_t a[4], b[4];
            ldmatrix_transposed(a, left + key_block * BLOCK_ROWS * TILE);
            right_operand<HEAD_DIM>(b, shared.keys, lane, key_block, j);
            mma<T>(result[0], a, b[0], b[1]);
            mma<T>(result[1], a, b[2], b[3]);
        }
        backward.store_queries(result, stage, half, 16 * j, is_whole, is_first);
    }
}

// Some key blocks, from key block `first` of the sample on, and all of its queries, tile by tile. Of a tile:
//
//     barrier 1   this tile is there, nobody reads the one before
//     all warps   copy the next tile (cp.async), until the end ..................................................
//     two warps   p and d of the spread key block, if there is one
//     all warps   p = exp2(k q^T ...) | dv += p g | d = v g^T | shares of r and the largest d into shared memory
//     barrier 2   all shares are there
//     all warps   r | ds = c p (d - r) into shared memory | dk += ds q | first half of ds to sums | spread: its ds
//     barrier 3   ds is complete, nobody adds to what the second half adds to
//     all warps   second half of ds to sums | spread: its dk and dv by columns
//                 dq = ds^T k, pieces of 16 x 16 dealt to the warps | wait (copies)
//
// Key blocks behind the last one that a query sees are left out. Between barriers warps run apart: the tensor cores may
// work for one while another computes exponentials.
template <typename T, typename Launch, bool LARGE>
__device__ __forceinline__ void walk_keys(
    const Backward<T, Launch, LARGE>& backward, int first, int key_blocks, bool is_whole, bool is_first) {
    auto& shared = backward.shared;
    const int warp = warp_index();
    KeyRows<Launch, Launch::HEAD_DIM> key_gradient = {};
    KeyRows<Launch, Launch::VALUE_DIM> value_gradient = {};
    SpreadKeyBlock<T, Launch, LARGE> spread{backward};
    const bool has_spread = key_blocks > spread.KEY_BLOCK;
    if (has_spread) spread.begin();
    backward.load_keys(first, key_blocks);
    const int tiles = ceil_div(shared.sample.row_blocks, HALVES);
    if (tiles) backward.load_queries(0, 0, is_whole);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % STAGES;
        cp_async_wait_all();
        backward.find_query_runs(warp, stage, key_blocks);
        __syncthreads();  // this tile is there, and nobody reads the one before, whose place the next one takes
        if (tile == 0) {
#pragma unroll
            for (int slot = 0; slot < Launch::SLOTS; ++slot) {
                const int key_block = own_key_block<Launch>(warp, slot);
                if (key_block < key_blocks) backward.find_key_run(key_block);
            }
        }
        if (tile + 1 < tiles) backward.load_queries(1 - stage, tile + 1, is_whole);
        const int seen = shared.seen_key_blocks[stage];
        const bool spreads = seen > spread.KEY_BLOCK;
        const uint32_t largest = spreads ? spread.find_probabilities(stage) : 0;
        Pairs<Launch> probabilities = {}, gradients = {};
        multiply<Launch, Launch::HEAD_DIM>(warp, probabilities, shared.keys, shared.queries[stage], seen);
#pragma unroll
        for (int i = 0; i < Launch::SLOTS * HALVES; ++i) {
            const int slot = i / HALVES, half = i % HALVES, key_block = own_key_block<Launch>(warp, slot);
            if (key_block < seen) backward.find_probabilities(probabilities[slot][half], stage, key_block, half);
        }
        accumulate<Launch, Launch::VALUE_DIM>(warp, value_gradient, probabilities, shared.grad[stage], seen);
        multiply<Launch, Launch::VALUE_DIM>(warp, gradients, shared.values, shared.grad[stage], seen);
        if (is_whole) share_sums(backward, probabilities, gradients);
        if (backward.is_learned()) share_largest(backward, gradients, largest);
        __syncthreads();  // all shares of this tile's sums are there
        const float row_sum = find_row_sum(spread, stage, seen, is_whole);
        if (blockIdx.x == 0 && is_first && thread_index() < WARP) shared.scale_sums[thread_index()] += row_sum;
        differentiate<Launch>(probabilities, gradients, row_sum, backward.head_scale());
        leave_score_gradient(warp, backward, gradients, seen);
        accumulate<Launch, Launch::HEAD_DIM>(warp, key_gradient, gradients, shared.queries[stage], seen);
        Sums sums{};
        if (backward.is_learned()) {
            sums = prepare_sums(backward, row_sum);
            add_to_sums(warp, backward, gradients, stage, 0, seen, sums);
        }
        if (spreads) spread.differentiate(stage, row_sum, sums);
        __syncthreads();  // the scores' gradient is complete, and nobody adds to what the second half adds to
        if (backward.is_learned()) add_to_sums(warp, backward, gradients, stage, 1, seen, sums);
        if (spreads) spread.accumulate(stage);
        find_query_gradient(backward, stage, seen, is_whole, is_first);
    }
    if (!tiles) cp_async_wait_all();
    __syncthreads();  // nobody reads the keys, which give way to their gradients
#pragma unroll
    for (int slot = 0; slot < Launch::SLOTS; ++slot) {
        const int key_block = own_key_block<Launch>(warp, slot);
        if (key_block >= key_blocks) continue;
        const auto &k = backward.gradients.k, &v = backward.gradients.v;
        backward.store_keys(key_gradient[slot], backward.arguments.scale, key_block, shared.keys, k);
        backward.store_keys(value_gradient[slot], backward.head_scale(), key_block, shared.values, v);
    }
    if (has_spread) spread.store();
    __syncthreads();  // the next keys take their place
}

// The backward pass but for what backward_row_sums.cuh and backward_sums.cuh do. Thread blocks: parts of keys, heads,
// groups of samples and one more.
//
//     heads of                  32       64      c64       96      c96   128/64  c128/64      128     c128   c: compact
//     warps                      8        8        8        8        6        8        6        8        4
//     key blocks                17       17        9        9        7        9        7        9        5   of a walk
//     registers, sm_80     189,188  254,254  153,154  192,193  192,193  189,192  199,200  228,229  241,244   .., LARGE
//     registers, sm_90a    196,192  255,255        -  198,199        -  197,201        -  229,233        -
//     shared memory         72,576  115,584   73,344   99,968   84,992   99,968   84,992  126,592   88,576   bytes
//     thread blocks for each multiprocessor: 1; tiles of 32 queries
//
// Vectors that are not LARGE take 12 bytes more for each entry, and sums by block difference 768 bytes each.
//
// Registers by ptxas of nvcc 13.0 in bfloat16, no spills; code for 9.0 has no compact shape. Bound by the bandwidth of
// shared memory and nearly as much by issue slots, in a model of an H100 (tools/count_backward.py), never by device
// memory. Where codes are runs, bias and gradient cost about 400 of 1,620 issue slots of a warp's 32 x 32 pairs, of
// other codes about 1,400.
template <typename T, int HEAD_DIM, int VALUE_DIM, bool COMPACT, bool LARGE>
__global__ void __launch_bounds__((BackwardLaunch<HEAD_DIM, VALUE_DIM, COMPACT>::THREADS), 1) attention_backward_kernel(
    const __grid_constant__ RelativeBiasAttention arguments,
    const __grid_constant__ RelativeBiasAttentionGradients gradients,
    const __grid_constant__ BackwardWorkspace workspace) {
    using Launch = BackwardLaunch<HEAD_DIM, VALUE_DIM, COMPACT>;
#if defined(__CUDA_ARCH__)
    if (!may_launch<HEAD_DIM, COMPACT>()) return __trap();  // a third of what there is to compile
#endif
    const int group = blockIdx.z, part = blockIdx.x;
    if (group == workspace.groups) return zero_inert_rows<T, Launch>(arguments, gradients);
    auto& shared = *static_cast<BackwardShared<T, Launch>*>(shared_memory());
    const Backward<T, Launch, LARGE> backward{arguments, gradients, workspace, shared};
    backward.begin();
    const int end_sample = workspace.first_sample(group + 1, arguments.samples);
#pragma unroll 1
    for (int sample = workspace.first_sample(group, arguments.samples); sample < end_sample; ++sample) {
        read_sample<BLOCK_ROWS>(shared.sample, shared.key_sample, arguments, sample);
        __syncthreads();  // everybody sees the sample, and what the thread block began with
        if (warp_index() == 0) {
            shared.differences.read_sample(arguments, gradients, shared.sample, workspace.differences);
        }
        const int key_blocks = shared.key_sample.row_blocks;
        const int first = workspace.first_key_block(part, key_blocks);
        const int end = workspace.first_key_block(part + 1, key_blocks);
        const bool is_whole = workspace.walks_whole(shared.key_sample);
        if (is_whole && key_blocks == 0) {
            fill_rows<T, HEAD_DIM, Launch::THREADS>(gradients.q, shared.sample, arguments.modalities, 0.f);
        } else if (is_whole || workspace.query_parts) {
#pragma unroll 1
            for (int key_block = first, taken = 0; key_block < end; key_block += taken) {
                taken = Launch::next_walk(end - key_block);
                walk_keys(backward, key_block, taken, is_whole, key_block == first);
            }
        } else {
            refuse_sample(backward);
        }
        flush(backward);
        __syncthreads();  // nobody reads the sample any more
    }
    __syncthreads();  // without samples too, everybody sees what the thread block began with
    add_all_differences(backward);
    if (part == 0 && workspace.scale_parts && thread_index() < WARP) {
        float sum = shared.scale_sums[thread_index()];
        for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
        if (thread_index() == 0) workspace.scale_parts[group * arguments.heads + blockIdx.y] = sum;
    }
}

}  // namespace onepeace_fast

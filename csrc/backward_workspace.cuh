// How the backward pass shares its work among thread blocks, and what they hand to each other in the workspace.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <algorithm>
#include <cstdint>

#include "relative_bias_attention.h"
#include "relative_bias_attention_forward.cuh"
#include "sample.cuh"

namespace onepeace_fast {

constexpr int HALVES = 2;  // blocks of queries in a tile
constexpr int TILE = HALVES * BLOCK_ROWS;
constexpr int MOST_PARTS = 8;
constexpr int BLOCKS_OF_A_PART = 4;  // at least: fewer keys are not worth a thread block

// Warps of a thread block, and the blocks of keys whose gradients each holds in registers. The compact shape is for
// GPUs whose thread blocks may have less shared memory than the other takes.
template <int HEAD_DIM_, bool COMPACT_>
struct BackwardLaunch {
    static constexpr int HEAD_DIM = HEAD_DIM_;
    static constexpr bool COMPACT = COMPACT_;
    static constexpr int WARPS = COMPACT && HEAD_DIM == 128 ? 4 : 8;
    static constexpr int SLOTS = COMPACT || HEAD_DIM == 128 ? 1 : 2;
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int SLOT_BLOCKS = WARPS * SLOTS;
    static constexpr int BLOCKS = SLOT_BLOCKS + 1;  // of keys in one walk: one more is spread over all warps

    // How many of some blocks are walked next: the spread block only where it saves a walk.
    static __host__ __device__ constexpr int next_walk(int blocks) { return blocks <= BLOCKS ? blocks : SLOT_BLOCKS; }
};

template <int HEAD_DIM>
constexpr bool HAS_COMPACT_SHAPE = HEAD_DIM > 32;

// A thread block walks a group of samples of one head, and of each sample a part of its keys. A sample whose keys fit
// is walked whole; of others each part writes its share of the queries' gradients.
struct BackwardWorkspace {
    int groups;
    int parts;
    int longest;      // blocks of keys, and of queries, that a sample is expected to have at most
    int walk_blocks;  // of keys, that one walk takes
    int entries;      // of all vectors, those of CLS included
    bool is_large;    // whether vectors are read, and their sums kept, in device memory
    float* row_sums;       // [rows, heads]; null, as the next, where max_length says that samples are walked whole
    float* query_parts;    // [parts, rows, heads, head_dim]
    float* entry_parts;    // [groups, parts, heads, entries]; null where all vectors are frozen
    int* sums;             // [groups, parts, heads, 2, entries], of large vectors
    float* scale_parts;    // [groups, heads]; null where the head scale is frozen
    int64_t bytes;

    __device__ bool walks_whole(const Sample& sample) const { return parts == 1 && sample.row_blocks <= walk_blocks; }

    __host__ __device__ int first_sample(int group, int samples) const {
        return static_cast<int>(static_cast<int64_t>(group) * samples / groups);
    }

    // The first block of keys of a part of a sample; the first part is never empty.
    __host__ __device__ int first_block(int part, int blocks) const { return ceil_div(part * blocks, parts); }

    // Where the entries of this thread block stand among those of all.
    __device__ int64_t first_entry(int group, int part, int head, int heads) const {
        return ((static_cast<int64_t>(group) * parts + part) * heads + head) * entries;
    }
};

// Blocks of keys in a sample, at most: those of each modality and of CLS are rounded up.
inline int most_blocks(const RelativeBiasAttention& arguments, int64_t length) {
    return static_cast<int>((length + (BLOCK_ROWS - 1) * (arguments.modalities + 1)) / BLOCK_ROWS);
}

inline int64_t count_entries(const RelativeBiasAttention& arguments) {
    int64_t entries = 0;
    for (int m = 0; m < arguments.bias_vectors; ++m) entries += arguments.bias[m].entries;
    return entries;
}

inline BackwardWorkspace share(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients,
    const BackwardPlan& plan) {
    BackwardWorkspace shared{};
    shared.walk_blocks = plan.walk_blocks;
    shared.is_large = plan.is_large;
    shared.entries = static_cast<int>(count_entries(arguments));
    const int samples = std::max(arguments.samples, 1), chip = std::max(gradients.multiprocessors, 1);
    const int64_t mean = ceil_div(arguments.rows, samples);
    shared.longest = most_blocks(arguments, arguments.max_length ? arguments.max_length : mean);
    // Two thread blocks for each multiprocessor, one after the other, even out unlike lengths.
    shared.groups = std::min(samples, std::max(1, 2 * chip / arguments.heads));
    const int64_t busy = static_cast<int64_t>(samples) * arguments.heads;
    const int idle = static_cast<int>(chip / busy);
    shared.parts = std::max(1, std::min({idle, MOST_PARTS, shared.longest / BLOCKS_OF_A_PART}));
    bool learned = false;
    for (int m = 0; m < arguments.bias_vectors; ++m) learned = learned || gradients.bias[m];
    const auto take = [&](int64_t elements) {
        void* taken = static_cast<char*>(gradients.workspace) + shared.bytes;
        shared.bytes += (elements * 4 + 15) / 16 * 16;
        return taken;
    };
    const int64_t pairs = static_cast<int64_t>(arguments.rows) * arguments.heads;
    const int64_t all = static_cast<int64_t>(shared.groups) * shared.parts * arguments.heads * shared.entries;
    if (shared.parts > 1 || !arguments.max_length || shared.longest > plan.walk_blocks) {
        shared.row_sums = static_cast<float*>(take(pairs));
        shared.query_parts = static_cast<float*>(take(shared.parts * pairs * arguments.head_dim));
    }
    if (learned) shared.entry_parts = static_cast<float*>(take(all));
    if (learned && shared.is_large) shared.sums = static_cast<int*>(take(2 * all));
    if (gradients.head_scale) {
        shared.scale_parts = static_cast<float*>(take(static_cast<int64_t>(shared.groups) * arguments.heads));
    }
    return shared;
}

// Of samples that all have max_length tokens.
template <typename Launch>
int64_t count_bytes(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients,
    const BackwardPlan& plan) {
    const BackwardWorkspace shared = share(arguments, gradients, plan);
    const int64_t pairs = static_cast<int64_t>(arguments.rows) * arguments.heads;
    const int64_t matrix = 2 * pairs * Launch::HEAD_DIM, vector = 4 * pairs;
    const int blocks = ceil_div(arguments.max_length, BLOCK_ROWS);
    int walks = 0;
    for (int left = ceil_div(blocks, shared.parts); left > 0; left -= Launch::next_walk(left)) walks += shared.parts;
    // Queries, their gradients, log-sum-exp and codes in each walk; keys, values, codes and all gradients once.
    int64_t bytes = walks * 2 * (matrix + vector) + 2 * matrix + vector + 3 * matrix;
    if (shared.query_parts) {
        const int64_t passes = ceil_div(blocks, ForwardLaunch<Launch::HEAD_DIM>::WARPS);
        bytes += 2 * (matrix + vector) + passes * (2 * matrix + vector);  // for row sums
        bytes += vector + walks * vector;                                 // of row sums
        bytes += 4 * pairs * Launch::HEAD_DIM * 2 * walks;                // of queries' gradients, in parts
    }
    // Begun once, added to for each sample, summed.
    const int64_t all = 4ll * shared.parts * arguments.heads * shared.entries;
    return bytes + all * (2 * shared.groups + 2 * arguments.samples);
}

}  // namespace onepeace_fast

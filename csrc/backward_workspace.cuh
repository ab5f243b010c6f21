// How the backward pass shares its work among thread blocks, and what they hand to each other in the workspace.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <algorithm>
#include <cstdint>

#include "forward_memory.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"

namespace onepeace_fast {

constexpr int HALVES = 2;  // row blocks of queries in a tile
constexpr int TILE = HALVES * BLOCK_ROWS;
constexpr int MOST_PARTS = 8;
// Of a part: a walk takes as long beside its key blocks, and as long again where it adds up the queries' gradients in
// the workspace.
constexpr int LEAST_KEY_BLOCKS = 4;

// Warps of a thread block, and the slots of each: key blocks, which are row blocks of keys, whose gradients it holds in
// registers. The compact shape is for GPUs that give a thread block less shared memory than the other takes.
template <int HEAD_DIM_, int VALUE_DIM_, bool COMPACT_>
struct BackwardLaunch {
    static constexpr int HEAD_DIM = HEAD_DIM_, VALUE_DIM = VALUE_DIM_, BOTH = HEAD_DIM + VALUE_DIM;
    static constexpr bool COMPACT = COMPACT_;
    static constexpr int WARPS = !COMPACT || BOTH < 192 ? 8 : BOTH == 192 ? 6 : 4;
    static constexpr int SLOTS = COMPACT || BOTH >= 192 ? 1 : 2;
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int SLOT_KEY_BLOCKS = WARPS * SLOTS;
    static constexpr int KEY_BLOCKS = SLOT_KEY_BLOCKS + 1;  // of one walk: one more is spread over all warps

    // How many of some key blocks are walked next: the spread one only where it saves a walk.
    static __host__ __device__ constexpr int next_walk(int key_blocks) {
        return key_blocks <= KEY_BLOCKS ? key_blocks : SLOT_KEY_BLOCKS;
    }
};

template <int HEAD_DIM>
constexpr bool HAS_COMPACT_SHAPE = HEAD_DIM > 32;

// Whether a GPU that the code is compiled for may launch a shape, which goes by its shared memory: compute capability
// 9.0 and 10 give a thread block 227 KiB, 12 gives 99 KiB. Code for 8.0 runs on both kinds, and so does PTX of 9.0;
// the build refuses PTX of 10 and 12.
template <int HEAD_DIM, bool COMPACT>
__host__ __device__ constexpr bool may_launch() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 10)
    return !COMPACT;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 12
    return COMPACT || !HAS_COMPACT_SHAPE<HEAD_DIM>;
#else
    return true;
#endif
}

// A thread block walks a group of samples of one head, and of each sample a part of its keys. A sample whose keys fit
// is walked whole; of others each part writes its share of the queries' gradients.
struct BackwardWorkspace {
    int groups;
    int parts;
    int query_row_blocks;   // that a sample is expected to have at most
    int walk_key_blocks;    // that one walk takes
    int entries;            // of all vectors, those of CLS included
    bool is_large;          // whether vectors are read, and their sums kept, in device memory
    int differences;        // block differences whose sums shared memory holds
    float* row_sums;     // [rows, heads]; null, as the next, where max_length says that keys are walked whole
    float* query_parts;  // [parts, rows, heads, head_dim]
    float* entry_parts;  // [groups, parts, heads, entries]; null where all vectors are frozen
    int* sums;           // [groups, parts, heads, 2, entries], of large vectors
    float* scale_parts;  // [groups, heads]; null where the head scale is frozen
    int64_t bytes;

    __device__ bool walks_whole(const Sample& keys) const {
        return parts == 1 && keys.row_blocks <= walk_key_blocks;
    }

    __host__ __device__ int first_sample(int group, int samples) const {
        return static_cast<int>(static_cast<int64_t>(group) * samples / groups);
    }

    // The first key block of a part of a sample that has some; the first part is never empty.
    __host__ __device__ int first_key_block(int part, int key_blocks) const {
        return ceil_div(part * key_blocks, parts);
    }

    // Where the entries of this thread block stand among those of all.
    __device__ int64_t first_entry(int group, int part, int head, int heads) const {
        return ((static_cast<int64_t>(group) * parts + part) * heads + head) * entries;
    }
};

// Row blocks of a sample, at most: those of each modality and of CLS are rounded up.
inline int most_row_blocks(const RelativeBiasAttention& arguments, int64_t length) {
    return static_cast<int>((length + (BLOCK_ROWS - 1) * (arguments.modalities + 1)) / BLOCK_ROWS);
}

// Shared memory of vectors and of their sums in fixed point; sums by block difference follow.
__host__ __device__ constexpr int64_t vector_bytes(bool is_large, int64_t entries) {
    return is_large ? 0 : (3 * static_cast<int64_t>(sizeof(float)) * entries + 15) / 16 * 16;
}

inline int64_t count_entries(const RelativeBiasAttention& arguments) {
    int64_t entries = 0;
    for (int m = 0; m < arguments.bias_vectors; ++m) entries += arguments.bias[m].entries;
    return entries;
}

// Row blocks of queries or of keys that a sample is expected to have at most.
inline int expected_row_blocks(const RelativeBiasAttention& arguments, const PackedRows& rows) {
    const int mean = ceil_div(rows.rows, std::max(arguments.samples, 1));
    return most_row_blocks(arguments, rows.max_length ? rows.max_length : mean);
}

// How many thread blocks share the work of a head.
inline BackwardShares share_work(
    const RelativeBiasAttention& arguments, int multiprocessors, const BackwardPlan& plan) {
    const int samples = std::max(arguments.samples, 1), heads = arguments.heads;
    const int row_blocks = expected_row_blocks(arguments, arguments.keys);
    const int64_t tiles = ceil_div(expected_row_blocks(arguments, arguments.queries), HALVES);
    multiprocessors = std::max(multiprocessors, 1);
    // The time of a thread block in that of a key block and a tile of queries: 309 cycles of an H100, modelled. Loading
    // four entries a thread takes about as long as all key blocks of a walk and a tile.
    const int64_t begin = plan.walk_key_blocks * (1 + count_entries(arguments) / (4 * plan.launch.threads));
    const auto find_time = [&](int parts) {
        const bool is_whole = parts == 1 && arguments.keys.max_length && row_blocks <= plan.walk_key_blocks;
        const int key_blocks = ceil_div(row_blocks, parts);
        const int walks = std::max(1, ceil_div(key_blocks - 1, plan.walk_key_blocks - 1));
        return tiles * (key_blocks + walks * LEAST_KEY_BLOCKS * (is_whole ? 1 : 2));
    };
    BackwardShares best{};
    int64_t least = 0;
    for (int parts = 1; parts <= MOST_PARTS; ++parts) {
        const int64_t all = static_cast<int64_t>(samples) * heads * parts;
        // Each part has the queries' gradients in the workspace: no more than even out what few samples leave idle.
        if (parts > 1 && (all > 4 * multiprocessors || row_blocks < parts * LEAST_KEY_BLOCKS)) break;
        // At least two thread blocks for each multiprocessor, one after the other, even out unlike lengths.
        const int first = std::min(samples, std::max(1, 2 * multiprocessors / (heads * parts)));
        for (int groups = first; groups <= std::min(samples, 4 * first); ++groups) {
            const int64_t thread_blocks = static_cast<int64_t>(groups) * heads * parts;
            const int64_t waves = (thread_blocks + multiprocessors - 1) / multiprocessors;
            const int64_t time = waves * (ceil_div(samples, groups) * find_time(parts) + begin);
            if (!best.groups || time < least) best = {groups, parts}, least = time;
        }
    }
    return best;
}

// How the work is shared on this device, and where its parts of the workspace begin: null plus offsets where the
// workspace is not there yet.
inline BackwardWorkspace plan_workspace(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients,
    const BackwardPlan& plan) {
    BackwardWorkspace workspace{};
    workspace.walk_key_blocks = plan.walk_key_blocks;
    workspace.is_large = plan.is_large;
    workspace.differences = plan.differences;
    workspace.entries = static_cast<int>(count_entries(arguments));
    workspace.query_row_blocks = expected_row_blocks(arguments, arguments.queries);
    const int key_row_blocks = expected_row_blocks(arguments, arguments.keys);
    const BackwardShares shares = share_work(arguments, gradients.multiprocessors, plan);
    workspace.groups = shares.groups;
    workspace.parts = shares.parts;
    bool learned = false;
    for (int m = 0; m < arguments.bias_vectors; ++m) learned = learned || gradients.bias[m];
    const auto take = [&](int64_t elements) {
        void* taken = static_cast<char*>(gradients.workspace) + workspace.bytes;
        workspace.bytes += (std::max<int64_t>(elements, 1) * 4 + 15) / 16 * 16;  // null says that it is not needed
        return taken;
    };
    const int64_t pairs = static_cast<int64_t>(arguments.queries.rows) * arguments.heads;
    const int64_t all = static_cast<int64_t>(workspace.groups) * workspace.parts * arguments.heads * workspace.entries;
    if (workspace.parts > 1 || !arguments.keys.max_length || key_row_blocks > plan.walk_key_blocks) {
        workspace.row_sums = static_cast<float*>(take(pairs));
        workspace.query_parts = static_cast<float*>(take(workspace.parts * pairs * arguments.head_dim));
    }
    if (learned) workspace.entry_parts = static_cast<float*>(take(all));
    if (learned && workspace.is_large) workspace.sums = static_cast<int*>(take(2 * all));
    if (gradients.head_scale) {
        workspace.scale_parts = static_cast<float*>(take(static_cast<int64_t>(workspace.groups) * arguments.heads));
    }
    return workspace;
}

// Bytes that a backward pass moves, for samples that all have max_length tokens.
template <typename Launch>
int64_t count_bytes(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients,
    const BackwardPlan& plan) {
    const BackwardWorkspace workspace = plan_workspace(arguments, gradients, plan);
    const int64_t pairs = static_cast<int64_t>(arguments.queries.rows) * arguments.heads;
    const int64_t vector = 4 * pairs;
    const int64_t both = 2 * pairs * Launch::BOTH;  // queries and gradients of their outputs, or keys and values
    const int row_blocks = ceil_div(arguments.keys.max_length, BLOCK_ROWS);
    int walks = 0;
    for (int left = ceil_div(row_blocks, workspace.parts); left > 0; left -= Launch::next_walk(left)) {
        walks += workspace.parts;
    }
    // Queries, their gradients, log-sum-exp and codes in each walk; keys, values, codes and all gradients once.
    int64_t bytes = walks * (both + 2 * vector) + both + vector + both + 2 * pairs * Launch::HEAD_DIM;
    if (workspace.query_parts) {
        using RowSums = ForwardLaunch<Launch::HEAD_DIM, Launch::VALUE_DIM, false>;
        const int64_t passes = ceil_div(row_blocks, RowSums::QUERY_BLOCKS);
        bytes += both + 2 * vector + passes * (both + vector);  // for row sums
        bytes += vector + walks * vector;                       // of row sums
        bytes += 4 * pairs * Launch::HEAD_DIM * 2 * walks;                // of queries' gradients, in parts
    }
    // Begun once, added to for each sample, summed.
    const int64_t all = 4ll * workspace.parts * arguments.heads * workspace.entries;
    return bytes + all * (2 * workspace.groups + 2 * arguments.samples);
}

}  // namespace onepeace_fast

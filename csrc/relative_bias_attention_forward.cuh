// What a thread block of the forward kernel holds in shared memory, and how it is loaded.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <climits>

#include "bias.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

constexpr int STAGES = 2;
constexpr int BIAS_CAPACITY = 7168;  // entries in shared memory: a grid of 42 x 42, or three 1-D vectors
constexpr int SMALLEST_SHARED_BYTES = 99 * 1024;  // that a thread block may have, of compute capability 8.6, 8.9, 12.0

// Warps of a thread block, keys of a tile, and thread blocks that a multiprocessor shall hold at once.
template <int HEAD_DIM>
struct ForwardLaunch {
    static constexpr int WARPS = HEAD_DIM == 128 ? 8 : 9;
    static constexpr int KEYS = HEAD_DIM == 128 ? 32 : 64;
    static constexpr int THREADS = WARPS * WARP;
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
    static constexpr int at_once(bool) { return 1; }  // shared memory of a multiprocessor holds no second one
#else
    static constexpr int at_once(bool windowed) { return windowed ? 1 : 2; }
#endif
};

// Of a thread's two rows: the largest score so far, and the sum of probabilities in this thread's columns. It stands in
// shared memory between tiles: the matrix products need its registers.
struct alignas(16) Softmax {
    float largest[2];
    float sum[2];
};

template <typename T, int HEAD_DIM>
struct alignas(128) ForwardShared {
    static constexpr int WARPS = ForwardLaunch<HEAD_DIM>::WARPS, KEYS = ForwardLaunch<HEAD_DIM>::KEYS;

    T keys[STAGES][KEYS * HEAD_DIM];
    T values[STAGES][KEYS * HEAD_DIM];
    T rows[WARPS][BLOCK_ROWS * HEAD_DIM];  // of each warp: its queries, at the end its results
    int key_code[STAGES][KEYS];            // of CLS keys: their modality
    Block tiles[STAGES];                   // the keys of each stage
    Softmax softmax[ForwardLaunch<HEAD_DIM>::THREADS];
    int row_code[WARPS][BLOCK_ROWS];       // of CLS queries: their modality
    Block blocks[WARPS];                   // the queries of each warp, none where the count is 0
    Range codes[WARPS];                    // of body queries, where the bias is windowed
    Sample sample;
    float cls[MAX_MODALITIES][CLS_ENTRIES];
    int bias_start[MAX_MODALITIES];
    int query_tile;
    // float bias[bias_capacity] follows.

    __device__ float* bias() { return reinterpret_cast<float*>(this + 1); }
};

// Every GPU that the kernels take holds them.
static_assert(sizeof(ForwardShared<bfloat16, 64>) + sizeof(float) * BIAS_CAPACITY <= SMALLEST_SHARED_BYTES);
static_assert(sizeof(ForwardShared<bfloat16, 128>) + sizeof(float) * BIAS_CAPACITY <= SMALLEST_SHARED_BYTES);

// One thread block's view of its sample and head.
template <typename T, int HEAD_DIM, bool WINDOWED>
struct Forward {
    using Memory = ForwardShared<T, HEAD_DIM>;
    static constexpr int THREADS = ForwardLaunch<HEAD_DIM>::THREADS, KEYS = ForwardLaunch<HEAD_DIM>::KEYS;
    static constexpr int ROW_CHUNKS = HEAD_DIM / CHUNK;

    const RelativeBiasAttention& arguments;
    Memory& shared;

    __device__ const T* source(int row, int which) const {
        return static_cast<const T*>(arguments.qkv) + row * arguments.row_stride + which * arguments.which_stride +
               blockIdx.y * arguments.head_stride;
    }

    // Begin to copy a tile's keys, values and codes; rows past its end repeat the last, lest a foreign NaN come in.
    __device__ __forceinline__ void load_keys(int stage, const Block& tile) const {
        const bool is_cls = tile.modality == arguments.modalities;
        const int rows = is_cls ? BLOCK_ROWS : KEYS, thread = thread_index();
        if (thread == 0) shared.tiles[stage] = tile;
#pragma unroll 1
        for (int i = thread; i < rows * ROW_CHUNKS; i += THREADS) {
            const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS, target = swizzled<HEAD_DIM>(row, chunk);
            const int from = find_row(shared.sample, arguments.modalities, tile, row).index;
            cp_async_16(shared.keys[stage] + target, source(from, 1) + chunk * CHUNK);
            cp_async_16(shared.values[stage] + target, source(from, 2) + chunk * CHUNK);
        }
        if (thread < rows) {
            const Row row = find_row(shared.sample, arguments.modalities, tile, thread);
            if (is_cls) {
                shared.key_code[stage][thread] = row.modality;
            } else {
                cp_async_4(shared.key_code[stage] + thread, arguments.code + row.index);
            }
        }
    }

    // Begin to copy this warp's queries and their codes.
    __device__ void load_queries(const Block& block) const {
        const int warp = thread_index() / WARP, lane = thread_index() % WARP;
#pragma unroll 1
        for (int i = lane; i < BLOCK_ROWS * ROW_CHUNKS; i += WARP) {
            const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
            const int from = find_row(shared.sample, arguments.modalities, block, row).index;
            cp_async_16(shared.rows[warp] + swizzled<HEAD_DIM>(row, chunk), source(from, 0) + chunk * CHUNK);
        }
        if (lane == 0) shared.blocks[warp] = block;
        const Row row = find_row(shared.sample, arguments.modalities, block, lane % BLOCK_ROWS);
        const bool is_cls = block.modality == arguments.modalities;
        const int code = is_cls ? row.modality : arguments.code[row.index];
        if (lane < BLOCK_ROWS) shared.row_code[warp][lane] = code;
        if (WINDOWED && !is_cls) {
            Range codes{code, code};
            codes.include_lanes();
            if (lane == 0) shared.codes[warp] = codes;
        }
    }

    // The CLS entries of every vector, and where each vector stands in shared memory.
    __device__ void describe_bias() const {
        const int m = thread_index();
        if (m < arguments.bias_vectors) {
            int start = 0;
#pragma unroll 1
            for (int i = 0; i < m; ++i) start += arguments.bias[i].entries - CLS_ENTRIES;
            shared.bias_start[m] = start;
            const int body = arguments.bias[m].entries - CLS_ENTRIES;
            for (int i = 0; i < CLS_ENTRIES; ++i) {
                shared.cls[m][i] = load_entry(arguments.bias[m], blockIdx.y, body + i);
            }
        }
    }

    // Whole vectors of the modalities that have body rows among the blocks of queries.
    __device__ void load_whole_bias(int first_block, int end_block) const {
#pragma unroll 1
        for (int m = 0, start = 0; m < arguments.bias_vectors; ++m) {
            const int end = start + ceil_div(shared.sample.body[m], BLOCK_ROWS);
            if (start < end_block && end > first_block) {
                const BiasVector& vector = arguments.bias[m];
                for (int i = thread_index(); i < vector.entries - CLS_ENTRIES; i += THREADS) {
                    shared.bias()[shared.bias_start[m] + i] = load_entry(vector, blockIdx.y, i);
                }
            }
            start = end;
        }
    }

    // First and last entry that a tile of keys can meet; none, first > last, without queries of its modality.
    __device__ Range find_entries(int stage, int modality) const {
        Range queries{INT_MAX, INT_MIN}, keys{INT_MAX, INT_MIN};
        for (int w = 0; w < ForwardLaunch<HEAD_DIM>::WARPS; ++w) {
            if (shared.blocks[w].count && shared.blocks[w].modality == modality) queries.include(shared.codes[w]);
        }
        if (queries.first > queries.last) return queries;
        for (int i = thread_index() % WARP; i < KEYS; i += WARP) {
            keys.include({shared.key_code[stage][i], shared.key_code[stage][i]});
        }
        keys.include_lanes();
        const int offset = arguments.bias[modality].code_offset;
        return {queries.first - keys.last + offset, queries.last - keys.first + offset};
    }

    __device__ void load_window(int modality, int first, int count) const {
        for (int i = thread_index(); i < count; i += THREADS) {
            shared.bias()[i] = load_entry(arguments.bias[modality], blockIdx.y, first + i);
        }
    }
};

}  // namespace onepeace_fast

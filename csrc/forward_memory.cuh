// What a thread block of the forward kernel, and of the row sums' kernel, holds in shared memory, and how it is loaded.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <climits>

#include "bias.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

constexpr int STAGES = 2;  // tiles in shared memory: one is computed while the next one is copied
constexpr int BIAS_CAPACITY = 7168;  // entries in shared memory: a grid of 42 x 42, or three 1-D vectors
constexpr int SMALLEST_SHARED_BYTES = 99 * 1024;  // what compute capability 8.6, 8.9 and 12.0 give a thread block

// Warps of a thread block, keys of a tile, and thread blocks that a multiprocessor shall hold at once.
template <int HEAD_DIM>
struct ForwardLaunch {
    static constexpr int WARPS = HEAD_DIM == 128 ? 8 : 9;
    static constexpr int KEYS = HEAD_DIM == 128 ? 32 : 64;
    static constexpr int THREADS = WARPS * WARP;
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
    // The shared memory of such a multiprocessor holds no second one.
    static constexpr int thread_blocks_at_once(bool) { return 1; }
#else
    static constexpr int thread_blocks_at_once(bool windowed) { return windowed ? 1 : 2; }
#endif
};

// Of a thread's two rows, between tiles: the matrix products need these registers.
struct alignas(16) RowState {
    float largest[2];  // score so far, base 2
    float sum[2];      // of probabilities relative to it, in this thread's columns
};

// The same of a pass over rows whose log-sum-exp is known.
struct alignas(16) RowSumState {
    float log_sum_exp[2];  // base 2
    float sum[2];          // of probability times its gradient, in this thread's columns
};

template <typename T, int HEAD_DIM>
struct alignas(128) ForwardShared {
    static constexpr int WARPS = ForwardLaunch<HEAD_DIM>::WARPS, KEYS = ForwardLaunch<HEAD_DIM>::KEYS;

    T keys[STAGES][KEYS * HEAD_DIM];
    T values[STAGES][KEYS * HEAD_DIM];
    T queries[WARPS][BLOCK_ROWS * HEAD_DIM];  // of each warp; at the end its results
    int key_code[STAGES][KEYS];               // of CLS keys: their modality
    RowBlock key_rows[STAGES];
    union {
        RowState row_states[ForwardLaunch<HEAD_DIM>::THREADS];
        RowSumState row_sum_states[ForwardLaunch<HEAD_DIM>::THREADS];
    };
    int query_code[WARPS][BLOCK_ROWS];  // of CLS queries: their modality
    RowBlock query_rows[WARPS];         // of each warp; none where the count is 0
    Range query_codes[WARPS];           // of body queries, where the bias is windowed
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

    // A row's queries (0), keys (1) or values (2): [HEAD_DIM].
    __device__ const T* source(int row, int which) const {
        return static_cast<const T*>(arguments.qkv) + row * arguments.row_stride + which * arguments.which_stride +
               blockIdx.y * arguments.head_stride;
    }

    // Begin to copy a tile's keys, values and codes. Rows past its end repeat the last one: what stands there in memory
    // may be NaN, which a product with zero would keep.
    __device__ __forceinline__ void load_keys(int stage, const RowBlock& tile) const {
        const bool is_cls = tile.modality == arguments.modalities;
        const int rows = is_cls ? BLOCK_ROWS : KEYS, thread = thread_index();
        if (thread == 0) shared.key_rows[stage] = tile;
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
    __device__ void load_queries(const RowBlock& row_block) const {
        const int warp = thread_index() / WARP, lane = thread_index() % WARP;
#pragma unroll 1
        for (int i = lane; i < BLOCK_ROWS * ROW_CHUNKS; i += WARP) {
            const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
            const int from = find_row(shared.sample, arguments.modalities, row_block, row).index;
            cp_async_16(shared.queries[warp] + swizzled<HEAD_DIM>(row, chunk), source(from, 0) + chunk * CHUNK);
        }
        if (lane == 0) shared.query_rows[warp] = row_block;
        const Row row = find_row(shared.sample, arguments.modalities, row_block, lane % BLOCK_ROWS);
        const bool is_cls = row_block.modality == arguments.modalities;
        const int code = is_cls ? row.modality : arguments.code[row.index];
        if (lane < BLOCK_ROWS) shared.query_code[warp][lane] = code;
        if (WINDOWED && !is_cls) {
            Range codes{code, code};
            codes.include_lanes();
            if (lane == 0) shared.query_codes[warp] = codes;
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

    // Whole vectors of the modalities that have body rows among these row blocks of queries.
    __device__ void load_whole_bias(int first_row_block, int end_row_block) const {
#pragma unroll 1
        for (int m = 0, start = 0; m < arguments.bias_vectors; ++m) {
            const int end = start + ceil_div(shared.sample.body[m], BLOCK_ROWS);
            if (start < end_row_block && end > first_row_block) {
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
            const RowBlock& rows = shared.query_rows[w];
            if (rows.count && rows.modality == modality) queries.include(shared.query_codes[w]);
        }
        if (queries.first > queries.last) return queries;
        for (int i = thread_index() % WARP; i < KEYS; i += WARP) {
            keys.include({shared.key_code[stage][i], shared.key_code[stage][i]});
        }
        keys.include_lanes();
        const int offset = arguments.bias[modality].code_offset;
        return {queries.first - keys.last + offset, queries.last - keys.first + offset};
    }

    // Some entries of a vector, from entry `first` on.
    __device__ void load_window(int modality, int first, int count) const {
        for (int i = thread_index(); i < count; i += THREADS) {
            shared.bias()[i] = load_entry(arguments.bias[modality], blockIdx.y, first + i);
        }
    }
};

}  // namespace onepeace_fast

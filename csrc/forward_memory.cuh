// What a thread block of the forward kernel, and of the row sums' kernel, holds in shared memory, and how it is loaded.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>

#include "bias.cuh"
#include "block_difference.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

constexpr int STAGES = 2;  // tiles in shared memory: one is computed while the next one is copied
constexpr int SMALLEST_SHARED_BYTES = 99 * 1024;  // what compute capability 8.6, 8.9 and 12.0 give a thread block

// Warps of a thread block, keys of a tile, and thread blocks that a multiprocessor shall hold at once.
template <int HEAD_DIM>
struct ForwardLaunch {
    static constexpr int WARPS = HEAD_DIM == 128 ? 8 : 9;
    static constexpr int KEYS = HEAD_DIM == 128 ? 32 : HEAD_DIM == 96 ? 48 : 64;
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
    float reference[2];  // close to its largest score so far, base 2
    float sum[2];        // of probabilities relative to it, in this thread's columns
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
    bool keys_are_runs[STAGES];  // of codes, a run in each row block
    union {
        RowState row_states[ForwardLaunch<HEAD_DIM>::THREADS];
        RowSumState row_sum_states[ForwardLaunch<HEAD_DIM>::THREADS];
    };
    int query_code[WARPS][BLOCK_ROWS];  // the entry for a key of code 0; of CLS queries: their modality
    RowBlock query_rows[WARPS];         // of each warp; none where the count is 0
    bool query_is_run[WARPS];           // of their codes
    Range query_codes[WARPS];           // of body queries, where the bias is windowed
    Sample sample;
    float cls[MAX_MODALITIES][CLS_ENTRIES];
    int bias_start[MAX_MODALITIES];
    int query_tile;
    float before_bias[BLOCK_ROWS];  // start_runs reads it for rows that are not there
    // float bias[bias_capacity + BLOCK_ROWS] follows, the last ones being as those before.

    __device__ float* bias() { return reinterpret_cast<float*>(this + 1); }
};

template <int HEAD_DIM>
constexpr int forward_shared_bytes(int bias_entries) {
    return static_cast<int>(sizeof(ForwardShared<bfloat16, HEAD_DIM>) + sizeof(float) * (bias_entries + BLOCK_ROWS));
}

// Entries of the bias in shared memory, and whether they are windows because not all of them fit.
struct BiasPlan {
    int capacity;
    bool is_windowed;
};

// For the entries of all vectors without those of CLS, and the bytes that a thread block may have. Entries are held
// whole as long as one thread block holds them, though from about half of that on a multiprocessor has one thread block
// at a time in place of two: windows would leave it one all the same, for the registers they take, and cost each tile
// two barriers and a test of each score's entry. Where even one does not hold them, windows are as large as fits.
template <int HEAD_DIM>
BiasPlan plan_bias(int64_t entries, int64_t shared_limit) {
    const int64_t room = (shared_limit - forward_shared_bytes<HEAD_DIM>(0)) / static_cast<int64_t>(sizeof(float));
    return {static_cast<int>(std::min(entries, std::max<int64_t>(room, 1))), entries > room};
}

// Every GPU that the kernels take holds vectors of 7168 entries: a grid of 42 x 42, or three 1-D vectors.
static_assert(forward_shared_bytes<64>(7168) <= SMALLEST_SHARED_BYTES);
static_assert(forward_shared_bytes<128>(7168) <= SMALLEST_SHARED_BYTES);

// What scores are counted in, base 2: the scale without its sign, which queries have then, and 1 where it is 0, as
// queries are then. Larger scores are then larger probabilities.
__device__ __forceinline__ float score_scale(const RelativeBiasAttention& arguments) {
    return arguments.scale == 0.f ? 1.f : fabsf(arguments.scale);
}

// One thread block's view of its sample and head.
template <typename T, int HEAD_DIM, bool WINDOWED>
struct Forward {
    using Memory = ForwardShared<T, HEAD_DIM>;
    static constexpr int THREADS = ForwardLaunch<HEAD_DIM>::THREADS, KEYS = ForwardLaunch<HEAD_DIM>::KEYS;
    static constexpr int ROW_CHUNKS = HEAD_DIM / CHUNK;
    static constexpr int COPYING_THREADS = HEAD_DIM == 96 ? 192 : 256;  // a tile's chunks divide evenly among them

    const RelativeBiasAttention& arguments;
    Memory& shared;

    // A row's queries (0), keys (1) or values (2): [HEAD_DIM].
    __device__ const T* source(int row, int which) const {
        return static_cast<const T*>(arguments.qkv) + row * arguments.row_stride + which * arguments.which_stride +
               blockIdx.y * arguments.head_stride;
    }

    // Begin to copy a tile's keys and values. Rows past its end repeat the last one: what stands there in memory may be
    // NaN, which a product with zero would keep.
    __device__ __forceinline__ void copy_keys(int stage, const RowBlock& tile) const {
        constexpr int ROWS = COPYING_THREADS / ROW_CHUNKS;  // at once
        const int thread = thread_index(), row = thread / ROW_CHUNKS, chunk = thread % ROW_CHUNKS;
        if (tile.modality == arguments.modalities) return copy_cls_keys(stage, tile);
        if (thread >= COPYING_THREADS) return;
        const int begin = shared.sample.first[tile.modality] + tile.first, target = swizzled<HEAD_DIM>(row, chunk);
#pragma unroll
        for (int first = 0; first < KEYS; first += ROWS) {
            copy_key(stage, target + first * HEAD_DIM, begin + min(first + row, tile.count - 1), chunk);
        }
    }

    __device__ __forceinline__ void copy_cls_keys(int stage, const RowBlock& tile) const {
#pragma unroll 1
        for (int i = thread_index(); i < BLOCK_ROWS * ROW_CHUNKS; i += THREADS) {
            const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
            const int from = find_row(shared.sample, arguments.modalities, tile, row).index;
            copy_key(stage, swizzled<HEAD_DIM>(row, chunk), from, chunk);
        }
    }

    __device__ __forceinline__ void copy_key(int stage, int target, int row, int chunk) const {
        const T* from = source(row, 1) + chunk * CHUNK;
        cp_async_16(shared.keys[stage] + target, from);
        cp_async_16(shared.values[stage] + target, from + arguments.which_stride);
    }

    // By the last warp, which copies fewer keys than others or none: a tile, and its codes, of CLS keys their modality.
    __device__ __forceinline__ void copy_codes(int stage, const RowBlock& tile) const {
        const int lane = thread_index() - (THREADS - WARP);
        const bool is_cls = tile.modality == arguments.modalities;
        if (lane == 0) shared.key_rows[stage] = tile;
        const BlockRows rows(shared.sample, arguments.modalities, tile);
        for (int i = lane; i >= 0 && i < (is_cls ? BLOCK_ROWS : KEYS); i += WARP) {
            if (is_cls) {
                shared.key_code[stage][i] = find_row(shared.sample, arguments.modalities, tile, i).modality;
            } else {
                cp_async_4(shared.key_code[stage] + i, arguments.code + rows[i]);
            }
        }
    }

    // By the last warp, whose copies have ended: what the codes are.
    __device__ __forceinline__ void describe_codes(int stage) const {
        if (WINDOWED || thread_index() < THREADS - WARP) return;
        __syncwarp();  // the codes of keys are there
        const bool runs = are_runs<KEYS>(shared.key_code[stage], shared.key_rows[stage].count);
        if (thread_index() % WARP == 0) shared.keys_are_runs[stage] = runs;
    }

    // Begin to load a tile of keys into its stage.
    __device__ __forceinline__ void load_keys(int stage, const RowBlock& tile) const {
        copy_codes(stage, tile);
        copy_keys(stage, tile);
    }

    // The tile after the one in a stage, into the other one.
    __device__ __forceinline__ void load_next_keys(int stage) const {
        load_keys(1 - stage, next_row_block(shared.sample, arguments.modalities, KEYS, shared.key_rows[stage]));
    }

    // Begin to copy this warp's queries, and load their codes.
    __device__ __forceinline__ void load_queries(const RowBlock& row_block) const {
        const int warp = thread_index() / WARP, lane = thread_index() % WARP;
        const BlockRows block_rows(shared.sample, arguments.modalities, row_block);
#pragma unroll 1
        for (int i = lane; i < BLOCK_ROWS * ROW_CHUNKS; i += WARP) {
            const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
            const T* from = source(block_rows[row], 0) + chunk * CHUNK;
            T* target = shared.queries[warp] + swizzled<HEAD_DIM>(row, chunk);
            if (arguments.scale > 0.f) {
                cp_async_16(target, from);
            } else {
                copy_turned(target, from);
            }
        }
        if (lane == 0) shared.query_rows[warp] = row_block;
        const Row row = find_row(shared.sample, arguments.modalities, row_block, lane % BLOCK_ROWS);
        const bool is_cls = row_block.modality == arguments.modalities;
        int code = is_cls ? row.modality : arguments.code[row.index];
        if (arguments.bias_vectors && !is_cls) {
            code += arguments.bias[row.modality].code_offset + (WINDOWED ? 0 : shared.bias_start[row.modality]);
        }
        if (lane < BLOCK_ROWS) shared.query_code[warp][lane] = code;
        if (WINDOWED) {
            Range codes{code, code};
            codes.include_lanes();
            if (lane == 0) shared.query_codes[warp] = codes;
        } else {
            __syncwarp();  // the codes of queries are there
            const bool is_run = are_runs<BLOCK_ROWS>(shared.query_code[warp], row_block.count);
            if (lane == 0) shared.query_is_run[warp] = is_run;
        }
    }

    // Queries with the sign of a scale that is negative or 0.
    __device__ void copy_turned(T* target, const T* from) const {
        const float sign = arguments.scale < 0.f ? -1.f : 0.f;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) target[i] = from_float<T>(sign * to_float(from[i]));
    }

    // In units of score_scale.
    __device__ __forceinline__ float load_bias(const BiasVector& vector, int entry) const {
        return load_entry(vector, blockIdx.y, entry) * (1.f / score_scale(arguments));
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
                shared.cls[m][i] = load_bias(arguments.bias[m], body + i);
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
                    shared.bias()[shared.bias_start[m] + i] = load_bias(vector, i);
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
        return {queries.first - keys.last, queries.last - keys.first};
    }

    // Some entries of a vector, from entry `first` on.
    __device__ void load_window(int modality, int first, int count) const {
        for (int i = thread_index(); i < count; i += THREADS) {
            shared.bias()[i] = load_bias(arguments.bias[modality], first + i);
        }
    }
};

}  // namespace onepeace_fast

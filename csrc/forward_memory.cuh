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
constexpr int SYSTEM_BYTES = 1024;  // of shared memory, beside each thread block of a multiprocessor
constexpr int SMALLEST_SHARED_BYTES = 99 * 1024;  // what compute capability 8.6, 8.9 and 12.0 give a thread block

// For the head sizes of keys and of values: row blocks of queries of a warp, warps of a thread block, keys of a tile,
// and thread blocks that a multiprocessor shall hold at once. What a warp reads of a tile serves all its row blocks.
// Where only one thread block fits, the compact shape has more warps, of fewer registers.
template <int HEAD_DIM_, int VALUE_DIM_, bool COMPACT>
struct ForwardLaunch {
    static constexpr int HEAD_DIM = HEAD_DIM_, VALUE_DIM = VALUE_DIM_, BOTH = HEAD_DIM + VALUE_DIM;
    static constexpr int ROW_BLOCKS = COMPACT ? 1 : 2;
    static constexpr int WARPS = !COMPACT ? (HEAD_DIM > 64 ? 4 : 5) : BOTH == 256 ? 8 : 9;
    static constexpr int QUERY_BLOCKS = WARPS * ROW_BLOCKS;
    static constexpr int KEYS = HEAD_DIM == 96 || (BOTH == 192 && !COMPACT) ? 48 : HEAD_DIM == 128 ? 32 : 64;
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int AT_ONCE = COMPACT ? 1 : 2;
};

// Of a thread's two rows of a row block, between tiles: the matrix products need these registers.
struct alignas(16) RowState {
    float reference[2];  // close to its largest score so far, base 2
    float sum[2];        // of probabilities relative to it, in this thread's columns
};

// The same of a pass over rows whose log-sum-exp is known.
struct alignas(16) RowSumState {
    float log_sum_exp[2];  // base 2
    float sum[2];          // of probability times its gradient, in this thread's columns
};

template <typename T, typename Launch>
struct alignas(128) ForwardShared {
    static constexpr int HEAD_DIM = Launch::HEAD_DIM, WARPS = Launch::WARPS, KEYS = Launch::KEYS;
    static constexpr int ROW_BLOCKS = Launch::ROW_BLOCKS, QUERY_BLOCKS = Launch::QUERY_BLOCKS;

    T keys[STAGES][KEYS * HEAD_DIM];
    T values[STAGES][KEYS * Launch::VALUE_DIM];
    T queries[QUERY_BLOCKS][BLOCK_ROWS * HEAD_DIM];  // of each warp, one after another; at the end its results
    int key_code[STAGES][KEYS];  // of CLS keys: their vector
    int key_order[STAGES][KEYS];
    RowBlock key_rows[STAGES];
    RowBlock next_key_rows[STAGES];  // of the next tile that some query sees; none where the count is not positive
    bool keys_are_runs[STAGES];      // of codes, a run in each row block
    bool keys_are_whole[STAGES];     // no key is missing, and none may be hidden
    Range key_orders[STAGES];
    bool attends[STAGES][WARPS];     // whether a warp has queries that see a key
    union {
        RowState row_states[ROW_BLOCKS][Launch::THREADS];
        RowSumState row_sum_states[ROW_BLOCKS][Launch::THREADS];
    };
    int query_code[QUERY_BLOCKS][BLOCK_ROWS];  // the entry for a key of code 0; of CLS queries: their vector
    int query_order[QUERY_BLOCKS][BLOCK_ROWS];
    Range query_orders[WARPS];
    RowBlock query_rows[QUERY_BLOCKS];  // none where the count is 0
    bool query_is_run[QUERY_BLOCKS];    // of their codes
    Range query_codes[WARPS];           // of body queries, where the bias is windowed
    Sample sample;
    Sample key_sample;
    float cls[MAX_MODALITIES][CLS_ENTRIES];
    int bias_start[MAX_MODALITIES];
    int query_tile;
    float before_bias[BLOCK_ROWS];  // start_runs reads it for rows that are not there
    // float bias[bias_capacity + BLOCK_ROWS] follows, the last ones being as those before.

    __device__ float* bias() { return reinterpret_cast<float*>(this + 1); }
};

template <typename Launch>
constexpr int forward_shared_bytes(int bias_entries) {
    return static_cast<int>(sizeof(ForwardShared<bfloat16, Launch>) + sizeof(float) * (bias_entries + BLOCK_ROWS));
}

// Entries of the bias in shared memory, and whether they are windows because not all of them fit.
struct BiasPlan {
    int capacity;
    bool is_windowed;
};

// For the entries of all vectors without those of CLS, and the bytes that a thread block may have. Entries are held
// whole as long as one thread block holds them, though from about half of that on a multiprocessor has one thread block
// at a time in place of two: windows would cost each tile two barriers and a test of each score's entry. Where even one
// does not hold them, windows are as large as fits.
template <typename Launch>
BiasPlan plan_bias(int64_t entries, int64_t shared_limit) {
    const int64_t room = (shared_limit - forward_shared_bytes<Launch>(0)) / static_cast<int64_t>(sizeof(float));
    return {static_cast<int>(std::min(entries, std::max<int64_t>(room, 1))), entries > room};
}

// Every GPU that the kernels take holds vectors of 7168 entries: a grid of 42 x 42, or three 1-D vectors.
static_assert(forward_shared_bytes<ForwardLaunch<64, 64, true>>(7168) <= SMALLEST_SHARED_BYTES);
static_assert(forward_shared_bytes<ForwardLaunch<128, 128, true>>(7168) <= SMALLEST_SHARED_BYTES);

// The larger shape where a multiprocessor holds as many thread blocks of it as it shall: its warps have as many rows
// as those of two compact ones, and one alone would leave it half as many warps as a compact one.
template <int HEAD_DIM, int VALUE_DIM>
ForwardPlan choose_forward_plan(int64_t entries, int64_t shared_limit) {
    using Larger = ForwardLaunch<HEAD_DIM, VALUE_DIM, false>;
    using Compact = ForwardLaunch<HEAD_DIM, VALUE_DIM, true>;
    const int64_t each = (shared_limit + SYSTEM_BYTES) / Larger::AT_ONCE - SYSTEM_BYTES;
    const BiasPlan of_larger = plan_bias<Larger>(entries, each);
    const auto plan = [](const BiasPlan& bias, auto shape) -> ForwardPlan {
        using Launch = decltype(shape);
        const int bytes = forward_shared_bytes<Launch>(bias.capacity);
        return {{Launch::THREADS, Launch::AT_ONCE, bytes}, Launch::ROW_BLOCKS == 1, bias.is_windowed, bias.capacity,
                Launch::QUERY_BLOCKS};
    };
    if (!of_larger.is_windowed) return plan(of_larger, Larger());
    return plan(plan_bias<Compact>(entries, shared_limit), Compact());
}

// What scores are counted in, base 2: the scale without its sign, which queries have then, and 1 where it is 0, as
// queries are then. Larger scores are then larger probabilities.
__device__ __forceinline__ float score_scale(const RelativeBiasAttention& arguments) {
    return arguments.scale == 0.f ? 1.f : fabsf(arguments.scale);
}

// One thread block's view of its sample and head.
template <typename T, typename Launch, bool WINDOWED>
struct Forward {
    using Memory = ForwardShared<T, Launch>;
    static constexpr int HEAD_DIM = Launch::HEAD_DIM, VALUE_DIM = Launch::VALUE_DIM;
    static constexpr int THREADS = Launch::THREADS, KEYS = Launch::KEYS, ROW_CHUNKS = HEAD_DIM / CHUNK;
    static constexpr int ROW_BLOCKS = Launch::ROW_BLOCKS;
    static constexpr int COPYING_THREADS =
        (HEAD_DIM == 96 ? 96 : 128) * (ROW_BLOCKS == 1 ? 2 : 1);  // a tile's chunks divide evenly among them
    static_assert(!WINDOWED || ROW_BLOCKS == 1);

    const RelativeBiasAttention& arguments;
    Memory& shared;

    // Begin to copy a tile's keys and values. Rows past its end repeat the last one: what stands there in memory may be
    // NaN, which a product with zero would keep.
    __device__ __forceinline__ void copy_keys(int stage, const RowBlock& tile) const {
        constexpr int ROWS = COPYING_THREADS / ROW_CHUNKS;  // at once
        const int thread = thread_index(), row = thread / ROW_CHUNKS, chunk = thread % ROW_CHUNKS;
        if (tile.modality == arguments.modalities) return copy_cls_keys(stage, tile);
        if (thread >= COPYING_THREADS) return;
        const int begin = shared.key_sample.first[tile.modality] + tile.first;
#pragma unroll
        for (int first = 0; first < KEYS; first += ROWS) {
            copy_key(stage, row, first, begin + min(first + row, tile.count - 1), chunk);
        }
    }

    __device__ __forceinline__ void copy_cls_keys(int stage, const RowBlock& tile) const {
#pragma unroll 1
        for (int i = thread_index(); i < BLOCK_ROWS * ROW_CHUNKS; i += THREADS) {
            const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
            const int from = find_row(shared.key_sample, arguments.modalities, tile, row).index;
            copy_key(stage, row, 0, from, chunk);
        }
    }

    // A chunk of row `from`, and of its values, to row `row` of `first` and those that follow.
    __device__ __forceinline__ void copy_key(int stage, int row, int first, int from, int chunk) const {
        T* key = shared.keys[stage] + first * HEAD_DIM;
        T* value = shared.values[stage] + first * VALUE_DIM;
        cp_async_16(key + swizzled<HEAD_DIM>(row, chunk), find_head_row<T>(arguments.k, from) + chunk * CHUNK);
        if (VALUE_DIM < HEAD_DIM && chunk * CHUNK >= VALUE_DIM) return;
        cp_async_16(value + swizzled<VALUE_DIM>(row, chunk), find_head_row<T>(arguments.v, from) + chunk * CHUNK);
    }

    // By the last warp, which copies fewer keys than others or none: a tile, its codes, of CLS keys their vector, and
    // its orders.
    __device__ __forceinline__ void copy_codes(int stage, const RowBlock& tile) const {
        const int lane = thread_index() - (THREADS - WARP);
        const bool is_cls = tile.modality == arguments.modalities;
        if (lane == 0) shared.key_rows[stage] = tile;
        const BlockRows rows(shared.key_sample, arguments.modalities, tile);
        for (int i = lane; i >= 0 && i < (is_cls ? BLOCK_ROWS : KEYS); i += WARP) {
            if (is_cls) {
                const int modality = find_row(shared.key_sample, arguments.modalities, tile, i).modality;
                shared.key_code[stage][i] = vector_of(arguments, modality);
            } else {
                cp_async_4(shared.key_code[stage] + i, arguments.keys.code + rows[i]);
            }
            if (has_order()) cp_async_4(shared.key_order[stage] + i, arguments.keys.order + rows[i]);
        }
    }

    __device__ bool has_order() const { return arguments.queries.order; }

    // By the last warp, whose copies have ended: what the codes and orders are, and which tile comes next.
    __device__ __forceinline__ void describe_keys(int stage) const {
        if (thread_index() < THREADS - WARP) return;
        __syncwarp();  // the codes of keys are there
        const RowBlock tile = shared.key_rows[stage];
        const bool runs = !WINDOWED && are_runs<KEYS>(shared.key_code[stage], tile.count);
        RowBlock next = next_row_block(shared.key_sample, arguments.modalities, KEYS, tile);
        if (has_order()) next = describe_orders(stage, tile, next);
        if (thread_index() % WARP == 0) {
            shared.keys_are_runs[stage] = runs;
            shared.keys_are_whole[stage] =
                !has_order() && tile.count == (tile.modality == arguments.modalities ? BLOCK_ROWS : KEYS);
            shared.next_key_rows[stage] = next;
        }
    }

    // Which warps have queries that see a key of the tile, and the first tile from `next` on that some query sees.
    __device__ RowBlock describe_orders(int stage, const RowBlock& tile, RowBlock next) const {
        const int lane = thread_index() % WARP;
        Range orders{INT_MAX, INT_MIN}, of_queries{INT_MAX, INT_MIN};
        for (int i = lane; i < tile.count; i += WARP) orders.include(shared.key_order[stage][i]);
        orders.include_lanes();
        if (lane < Launch::WARPS && shared.query_rows[lane * ROW_BLOCKS].count) {
            of_queries = shared.query_orders[lane];
            shared.attends[stage][lane] = orders.first <= of_queries.last;
        }
        of_queries.include_lanes();
        if (lane == 0) shared.key_orders[stage] = orders;
        for (; next.count > 0; next = next_row_block(shared.key_sample, arguments.modalities, KEYS, next)) {
            const BlockRows rows(shared.key_sample, arguments.modalities, next);
            bool is_seen = false;
            for (int i = lane; i < next.count; i += WARP) is_seen |= arguments.keys.order[rows[i]] <= of_queries.last;
            if (__ballot_sync(0xffffffff, is_seen)) break;
        }
        return next;
    }

    // Begin to load a tile of keys into its stage.
    __device__ __forceinline__ void load_keys(int stage, const RowBlock& tile) const {
        copy_codes(stage, tile);
        copy_keys(stage, tile);
    }

    // The number of this warp's first row block of queries.
    __device__ static __forceinline__ int first_query_block() { return thread_index() / WARP * ROW_BLOCKS; }

    // Begin to copy this warp's queries, and load their codes: of a sample's row blocks, those from `first` on, before
    // `end`. Where that is one less than it takes, the last one stands in for it, and its results are not stored.
    __device__ __forceinline__ void load_queries(int first, int end) const {
        const int warp = thread_index() / WARP, lane = thread_index() % WARP;
#pragma unroll 1
        for (int block = 0; block < ROW_BLOCKS; ++block) {
            RowBlock row_block = find_query_rows(min(first + block, end - 1));
            copy_queries(shared.queries[first_query_block() + block], row_block);
            if (first + block >= end) row_block.count = 0;
            if (lane == 0) set_query_rows(block, row_block);
        }
        const int block = lane / BLOCK_ROWS % ROW_BLOCKS;  // of this lane; a lone one is of all lanes, twice
        const RowBlock row_block = find_query_rows(min(first + block, end - 1));
        const Row row = find_row(shared.sample, arguments.modalities, row_block, lane % BLOCK_ROWS);
        const bool is_cls = row_block.modality == arguments.modalities;
        const int vector = vector_of(arguments, row.modality);
        int code = is_cls ? vector : arguments.queries.code[row.index];
        if (arguments.bias_vectors && !is_cls) {
            code += arguments.bias[vector].code_offset + (WINDOWED ? 0 : shared.bias_start[vector]);
        }
        const bool is_mine = lane < BLOCK_ROWS * ROW_BLOCKS;
        int* const query_code = shared.query_code[first_query_block() + block];
        if (is_mine) query_code[lane % BLOCK_ROWS] = code;
        if (has_order()) {
            const int order = arguments.queries.order[row.index];
            if (is_mine) shared.query_order[first_query_block() + block][lane % BLOCK_ROWS] = order;
            Range orders{order, order};
            orders.include_lanes();
            if (lane == 0) shared.query_orders[warp] = orders;
        }
        if (WINDOWED) {
            Range codes{code, code};
            codes.include_lanes();
            if (lane == 0) shared.query_codes[warp] = codes;
        } else {
            __syncwarp();  // the codes of queries are there
#pragma unroll
            for (int i = first_query_block(); i < first_query_block() + ROW_BLOCKS; ++i) {
                const bool is_run = are_runs<BLOCK_ROWS>(shared.query_code[i], shared.query_rows[i].count);
                if (lane == 0) shared.query_is_run[i] = is_run;
            }
        }
    }

    __device__ __forceinline__ RowBlock find_query_rows(int index) const {
        return find_row_block(shared.sample, arguments.modalities, BLOCK_ROWS, index);
    }

    __device__ __forceinline__ void copy_queries(T* queries, const RowBlock& row_block) const {
        const BlockRows block_rows(shared.sample, arguments.modalities, row_block);
#pragma unroll 1
        for (int i = thread_index() % WARP; i < BLOCK_ROWS * ROW_CHUNKS; i += WARP) {
            const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
            const T* from = find_head_row<T>(arguments.q, block_rows[row]) + chunk * CHUNK;
            T* target = queries + swizzled<HEAD_DIM>(row, chunk);
            if (arguments.scale > 0.f) {
                cp_async_16(target, from);
            } else {
                copy_turned(target, from);
            }
        }
    }

    // A row block of this warp, by one lane; the first one says whether it has any.
    __device__ __forceinline__ void set_query_rows(int block, const RowBlock& row_block) const {
        shared.query_rows[first_query_block() + block] = row_block;
        for (int stage = 0; block == 0 && stage < STAGES; ++stage) {
            shared.attends[stage][thread_index() / WARP] = row_block.count;
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

    // Whether body rows have a vector.
    __device__ __forceinline__ bool has_vector(const RowBlock& rows, int vector) const {
        return rows.modality < arguments.modalities && vector_of(arguments, rows.modality) == vector;
    }

    // Whole vectors of the modalities that have body rows among these row blocks of queries; one for all is always one.
    __device__ void load_whole_bias(int first_row_block, int end_row_block) const {
        if (arguments.bias_vectors == 1) first_row_block = -1;
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

    // First and last entry that a tile of keys can meet; none, first > last, without queries of its vector.
    __device__ Range find_entries(int stage, int vector) const {
        Range queries{INT_MAX, INT_MIN}, keys{INT_MAX, INT_MIN};
        for (int w = 0; w < Launch::WARPS; ++w) {
            const RowBlock& rows = shared.query_rows[w];
            if (rows.count && has_vector(rows, vector)) queries.include(shared.query_codes[w]);
        }
        if (queries.first > queries.last) return queries;
        for (int i = thread_index() % WARP; i < KEYS; i += WARP) {
            keys.include({shared.key_code[stage][i], shared.key_code[stage][i]});
        }
        keys.include_lanes();
        return {queries.first - keys.last, queries.last - keys.first};
    }

    // Some entries of a vector, from entry `first` on.
    __device__ void load_window(int vector, int first, int count) const {
        for (int i = thread_index(); i < count; i += THREADS) {
            shared.bias()[i] = load_bias(arguments.bias[vector], first + i);
        }
    }
};

}  // namespace onepeace_fast

// How what a thread block of the backward kernel holds in shared memory is loaded, and how it is stored.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <climits>
#include <cmath>

#include "backward_shared.cuh"
#include "backward_workspace.cuh"
#include "bias.cuh"
#include "bias_gradient.cuh"
#include "block_difference.cuh"
#include "difference_sums.cuh"
#include "forward_memory.cuh"
#include "gradient_rows.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

// One thread block's view of its head, its samples one after another.
template <typename T, typename Launch_, bool LARGE>
struct Backward {
    using Launch = Launch_;
    using Memory = BackwardShared<T, Launch>;
    static constexpr int HEAD_DIM = Launch::HEAD_DIM, VALUE_DIM = Launch::VALUE_DIM, THREADS = Launch::THREADS;
    static constexpr int ROW_CHUNKS = HEAD_DIM / CHUNK;

    const RelativeBiasAttention& arguments;
    const RelativeBiasAttentionGradients& gradients;
    const BackwardWorkspace& workspace;
    Memory& shared;

    __device__ bool has_order() const { return arguments.queries.order; }

    __device__ int64_t first_entry() const {
        return workspace.first_entry(blockIdx.z, blockIdx.x, blockIdx.y, arguments.heads);
    }

    // [2, entries].
    __device__ int* sums() const {
        if (LARGE) return workspace.sums + 2 * first_entry();
        return reinterpret_cast<int*>(shared.bias() + workspace.entries);
    }

    // [workspace.differences].
    __device__ DifferenceSums* difference_sums() const {
        return reinterpret_cast<DifferenceSums*>(
            reinterpret_cast<char*>(shared.bias()) + vector_bytes(LARGE, workspace.entries));
    }

    __device__ bool is_learned() const { return workspace.entry_parts; }

    __device__ float head_scale() const {
        return arguments.head_scale ? load_element(arguments.head_scale, arguments.head_scale_type, blockIdx.y) : 1.f;
    }

    __device__ Side keys(int key_block) const {
        return side(shared.key_rows[key_block], shared.key_code + key_block * BLOCK_ROWS);
    }

    __device__ Side queries(int stage, int half) const {
        return side(shared.query_rows[stage][half], shared.query_code[stage] + half * BLOCK_ROWS);
    }

    // The bias of a pair in base 2.
    __device__ __forceinline__ float bias(int vector, int entry) const {
        if (!LARGE) return shared.bias()[entry];
        return load_entry(arguments.bias[vector], blockIdx.y, entry - shared.bias_start[vector]);
    }

    // Load the vectors, and set all sums to zero.
    __device__ void begin() const {
#pragma unroll 1
        for (int m = 0, start = 0; m < arguments.bias_vectors; ++m) {
            const BiasVector& vector = arguments.bias[m];
            if (thread_index() == 0) shared.bias_start[m] = start;
            if (!LARGE) {
                for (int i = thread_index(); i < vector.entries; i += THREADS) {
                    shared.bias()[start + i] = load_entry(vector, blockIdx.y, i);
                }
            }
            start += vector.entries;
        }
        if (is_learned()) {
            for (int i = thread_index(); i < workspace.entries; i += THREADS) {
                workspace.entry_parts[first_entry() + i] = 0.f;
                sums()[i] = sums()[workspace.entries + i] = 0;
            }
            auto* zeros = reinterpret_cast<float*>(difference_sums());
            const int floats = workspace.differences * static_cast<int>(sizeof(DifferenceSums) / sizeof(float));
            for (int i = thread_index(); i < floats; i += THREADS) zeros[i] = 0.f;
        }
        if (thread_index() < WARP) shared.scale_sums[thread_index()] = 0.f;
        if (thread_index() == 0) {
            shared.exponent = MOST_EXPONENT;
            shared.is_finite = true;
            shared.differences.begin();
        }
    }

    // The key that stands in a row of shared memory.
    __device__ Row find_key(int row) const {
        return find_row(
            shared.key_sample, arguments.modalities, shared.key_rows[row / BLOCK_ROWS], row % BLOCK_ROWS);
    }

    // Scores of a key block and half a tile of queries become probabilities, zero past the last key and query and where
    // an order hides the key.
    __device__ __forceinline__ void find_probabilities(
        float (&scores)[2][4], int stage, int key_block, int half) const {
        const int lane = thread_index() % WARP;
        const float scale = LOG2_E * arguments.scale;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float2 log_sum_exp = *reinterpret_cast<const float2*>(
                shared.log_sum_exp[stage] + half * BLOCK_ROWS + 8 * n + 2 * (lane % 4));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[n][i] = scores[n][i] * scale - (i % 2 ? log_sum_exp.y : log_sum_exp.x);
            }
        }
        const Run key_run = shared.key_runs[key_block], query_run = shared.query_runs[stage][half];
        if (!LARGE && key_run.vector >= 0 && key_run.vector == query_run.vector && key_run.order <= query_run.order) {
            const float* entries = shared.bias() + (query_run.first - key_run.first - lane_distance(lane));
            float bias[DIAGONALS];
#pragma unroll
            for (int i = 0; i < DIAGONALS; ++i) bias[i] = entries[-diagonal_distance(i)];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                scores[i / 4][i % 4] = fast_exp2(scores[i / 4][i % 4] + bias[diagonal(i / 4, i % 4)]);
            }
            return;
        }
        const Side keys = this->keys(key_block);
        if (arguments.bias_vectors) {
            visit_entries(
                arguments, shared.bias_start, keys, queries(stage, half),
                [&](int n, int i, int vector, int entry) { scores[n][i] += bias(vector, entry); });
        }
        if (has_order()) hide_later(scores, stage, key_block, half);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const bool is_key = lane / 4 + i % 4 / 2 * 8 < keys.count;
            scores[i / 4][i % 4] = is_key ? fast_exp2(scores[i / 4][i % 4]) : 0.f;
        }
    }

    // Scores of keys whose order is above a query's.
    __device__ __forceinline__ void hide_later(float (&scores)[2][4], int stage, int key_block, int half) const {
        const int lane = thread_index() % WARP;
        const int* key_order = shared.key_order + key_block * BLOCK_ROWS + lane / 4;
        const int* query_order = shared.query_order[stage] + half * BLOCK_ROWS + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (key_order[i % 4 / 2 * 8] > query_order[i / 4 * 8 + i % 2]) scores[i / 4][i % 4] = -INFINITY;
        }
    }

    // Begin to copy the keys and values of key blocks from `first` of the sample on; by all threads, behind a barrier.
    __device__ void load_keys(int first, int key_blocks) const {
        const int thread = thread_index();
        if (thread < key_blocks) {
            const RowBlock row_block =
                find_row_block(shared.key_sample, arguments.modalities, BLOCK_ROWS, first + thread);
            shared.key_rows[thread] = row_block;
            shared.key_runs[thread] = NO_RUN;
            if (has_order()) {
                const BlockRows rows(shared.key_sample, arguments.modalities, row_block);
                Range orders{INT_MAX, INT_MIN};
                for (int i = 0; i < row_block.count; ++i) orders.include(arguments.keys.order[rows[i]]);
                shared.key_orders[thread] = orders;
            }
        }
        __syncthreads();  // every key block is known
#pragma unroll 1
        for (int i = thread; i < key_blocks * BLOCK_ROWS * ROW_CHUNKS; i += THREADS) {
            const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS, from = find_key(row).index;
            T* target = shared.keys + swizzled<HEAD_DIM>(row, chunk);
            cp_async_16(target, find_head_row<T>(arguments.k, from) + chunk * CHUNK);
            if (!has_value(chunk)) continue;
            target = shared.values + swizzled<VALUE_DIM>(row, chunk);
            cp_async_16(target, find_head_row<T>(arguments.v, from) + chunk * CHUNK);
        }
#pragma unroll 1
        for (int i = thread; i < key_blocks * BLOCK_ROWS; i += THREADS) {
            const Row row = find_key(i);
            load_code(shared.key_code + i, arguments.keys, shared.key_sample, row);
            if (has_order()) cp_async_4(shared.key_order + i, arguments.keys.order + row.index);
        }
    }

    // Begin to copy a tile of queries, the gradients of their outputs, log-sum-exp and codes. Rows past the last one
    // repeat it, since what stands there in memory may be NaN, and have no probabilities.
    __device__ __forceinline__ void load_queries(int stage, int tile, bool is_whole) const {
        const int thread = thread_index(), row_blocks = shared.sample.row_blocks;
        const auto find = [&](int half) {
            return find_row_block(
                shared.sample, arguments.modalities, BLOCK_ROWS, min(HALVES * tile + half, row_blocks - 1));
        };
#pragma unroll 1
        for (int i = thread; i < TILE * ROW_CHUNKS; i += THREADS) {
            const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
            const RowBlock row_block = find(row / BLOCK_ROWS);
            const int64_t from = find_row(shared.sample, arguments.modalities, row_block, row % BLOCK_ROWS).index;
            T* target = shared.queries[stage] + swizzled<HEAD_DIM>(row, chunk);
            cp_async_16(target, find_head_row<T>(arguments.q, from) + chunk * CHUNK);
            if (!has_value(chunk)) continue;
            target = shared.grad[stage] + swizzled<VALUE_DIM>(row, chunk);
            cp_async_16(
                target, static_cast<const T*>(gradients.grad) + from * gradients.row_stride +
                            blockIdx.y * gradients.head_stride + chunk * CHUNK);
        }
        if (thread < TILE) {
            const int half = thread / BLOCK_ROWS;
            const RowBlock row_block = find(half);
            const int count = HALVES * tile + half < row_blocks ? row_block.count : 0;
            const Row row = find_row(shared.sample, arguments.modalities, row_block, thread % BLOCK_ROWS);
            load_code(shared.query_code[stage] + thread, arguments.queries, shared.sample, row);
            if (has_order()) cp_async_4(shared.query_order[stage] + thread, arguments.queries.order + row.index);
            const int64_t index = static_cast<int64_t>(row.index) * arguments.heads + blockIdx.y;
            if (thread % BLOCK_ROWS < count) {
                cp_async_4(shared.log_sum_exp[stage] + thread, gradients.log_sum_exp + index);
                if (!is_whole) cp_async_4(shared.row_sums[stage] + thread, workspace.row_sums + index);
            } else {
                shared.log_sum_exp[stage][thread] = INFINITY;
                shared.row_sums[stage][thread] = 0.f;
            }
            if (thread % BLOCK_ROWS == 0) {
                shared.query_rows[stage][half] = {row_block.modality, row_block.first, count};
            }
        }
    }

    // Find the runs of a tile's queries and the keys that they see, and turn log-sum-exp to base 2; by the first warp,
    // which copied codes, orders and these, after the copies.
    __device__ __forceinline__ void find_query_runs(int warp, int stage, int key_blocks) const {
        if (warp != 0) return;
        shared.log_sum_exp[stage][thread_index()] *= LOG2_E;
        if (has_order()) {
            const int lane = thread_index();
            Range orders{INT_MAX, INT_MIN};
            orders.include(shared.query_order[stage][lane]);
            orders.include_lanes();
            const bool sees = lane < key_blocks && shared.key_orders[lane].first <= orders.last;
            key_blocks = 32 - __clz(__ballot_sync(0xffffffff, sees));
        }
        if (thread_index() == 0) shared.seen_key_blocks[stage] = key_blocks;
        __syncwarp();  // all codes are there
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            const RowBlock row_block = shared.query_rows[stage][half];
            Run run =
                shared.differences.find_run(arguments, row_block, shared.query_code[stage] + half * BLOCK_ROWS);
            if (has_order()) {
                Range orders{INT_MAX, INT_MIN};
                for (int i = 0; i < BLOCK_ROWS; ++i) orders.include(shared.query_order[stage][half * BLOCK_ROWS + i]);
                run.order = orders.first;
            }
            if (thread_index() == 0) {
                const int v = run.vector;
                if (v >= 0) run.first += shared.bias_start[v] + arguments.bias[v].code_offset;
                if (run.place >= 0) run.place += shared.differences.equal[row_block.modality];
                shared.query_runs[stage][half] = run;
            }
        }
    }

    // Find the run of a key block, for the warp that calls.
    __device__ __forceinline__ void find_key_run(int key_block) const {
        Run run = shared.differences.find_run(
            arguments, shared.key_rows[key_block], shared.key_code + key_block * BLOCK_ROWS);
        if (has_order()) run.order = shared.key_orders[key_block].last;
        if (thread_index() % WARP == 0) shared.key_runs[key_block] = run;
        __syncwarp();  // all lanes see it
    }

    // Store the gradients of a key block or of its values, which a warp holds, through the memory `staged` that held
    // these: [KEY_BLOCKS, BLOCK_ROWS, SIZE].
    template <int CHUNKS>
    __device__ __forceinline__ void store_keys(
        const float (&values)[CHUNKS][4], float factor, int key_block, T* staged, const GradientRows& gradient) const {
        constexpr int SIZE = CHUNKS * CHUNK;
        const int lane = thread_index() % WARP;
        staged += key_block * BLOCK_ROWS * SIZE;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int n = 0; n < CHUNKS; ++n) {
                T* target = staged + swizzled<SIZE>(lane / 4 + 8 * i, n) + 2 * (lane % 4);
                *reinterpret_cast<uint32_t*>(target) =
                    pack<T>(values[n][2 * i] * factor, values[n][2 * i + 1] * factor);
            }
        }
        __syncwarp();  // the rows are complete
        const BlockRows rows(shared.key_sample, arguments.modalities, shared.key_rows[key_block]);
#pragma unroll 1
        for (int i = lane; i < shared.key_rows[key_block].count * CHUNKS; i += WARP) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            *reinterpret_cast<uint4*>(gradient_row<T, SIZE>(gradient, rows[row]) + chunk * CHUNK) =
                *reinterpret_cast<const uint4*>(staged + swizzled<SIZE>(row, chunk));
        }
    }

    // Store 16 rows and columns of the gradient of a tile's queries: of a sample that is walked whole as they are, else
    // added to what this part has of the keys before.
    __device__ __forceinline__ void store_queries(
        const float (&values)[2][4], int stage, int half, int columns, bool is_whole, bool is_first) const {
        const int warp = thread_index() / WARP, lane = thread_index() % WARP;
        const RowBlock row_block = shared.query_rows[stage][half];
        if (row_block.count == 0) return;
        const auto find = [&](int row) {
            return static_cast<int64_t>(find_row(shared.sample, arguments.modalities, row_block, row).index);
        };
        if (is_whole) {
            T* staged = shared.results[warp];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                T* target = staged + (lane / 4 + i % 2 * 8) * BLOCK_ROWS + i / 2 * 8 + 2 * (lane % 4);
                *reinterpret_cast<uint32_t*>(target) = pack<T>(
                    values[i / 2][i % 2 * 2] * arguments.scale, values[i / 2][i % 2 * 2 + 1] * arguments.scale);
            }
            __syncwarp();  // the rows are complete
            const int row = lane / 2, chunk = lane % 2;
            if (row < row_block.count) {
                *reinterpret_cast<uint4*>(gradient_row<T, HEAD_DIM>(gradients.q, find(row)) + columns + chunk * CHUNK) =
                    *reinterpret_cast<const uint4*>(staged + row * BLOCK_ROWS + chunk * CHUNK);
            }
            __syncwarp();  // the next rows take their place
            return;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = lane / 4 + 8 * i;
            if (row >= row_block.count) continue;
            const int64_t rows = arguments.queries.rows, index = (blockIdx.x * rows + find(row)) * arguments.heads;
            auto* target = reinterpret_cast<float2*>(
                workspace.query_parts + (index + blockIdx.y) * HEAD_DIM + columns + 2 * (lane % 4));
            float2 sums[2] = {};  // a row's 8 columns, and the next 8
            if (!is_first) sums[0] = target[0], sums[1] = target[4];
            target[0] = {sums[0].x + values[0][2 * i], sums[0].y + values[0][2 * i + 1]};
            target[4] = {sums[1].x + values[1][2 * i], sums[1].y + values[1][2 * i + 1]};
        }
    }

    // Of queries or of keys, whichever are more.
    __device__ int rows() const { return max(shared.sample.row_blocks, shared.key_sample.row_blocks) * BLOCK_ROWS; }

private:
    // Whether values are as wide as the chunk.
    __device__ static bool has_value(int chunk) { return VALUE_DIM == HEAD_DIM || chunk < VALUE_DIM / CHUNK; }

    __device__ Side side(const RowBlock& row_block, const int* code) const {
        const int m = row_block.modality;
        return {code, vector_of(arguments, m), row_block.count, m == arguments.modalities};
    }

    // A row's code, or the vector of a CLS row, which stands last in its segment.
    __device__ void load_code(int* target, const PackedRows& rows, const Sample& sample, const Row& row) const {
        if (row.index < sample.first[row.modality] + sample.body[row.modality]) {
            cp_async_4(target, rows.code + row.index);
        } else {
            *target = vector_of(arguments, row.modality);
        }
    }
};

// A sample that max_length did not promise has no workspace: its gradients are NaN, which nobody can overlook.
template <typename T, typename Launch, bool LARGE>
__device__ __forceinline__ void refuse_sample(const Backward<T, Launch, LARGE>& backward) {
    auto& shared = backward.shared;
    const int modalities = backward.arguments.modalities;
    const auto& gradients = backward.gradients;
    fill_rows<T, Launch::HEAD_DIM, Launch::THREADS>(gradients.q, shared.sample, modalities, NAN);
    fill_rows<T, Launch::HEAD_DIM, Launch::THREADS>(gradients.k, shared.key_sample, modalities, NAN);
    fill_rows<T, Launch::VALUE_DIM, Launch::THREADS>(gradients.v, shared.key_sample, modalities, NAN);
    if (thread_index() == 0) {
        shared.scale_sums[0] = NAN;
        shared.is_finite = false;
    }
}

}  // namespace onepeace_fast

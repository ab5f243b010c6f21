// Flash attention forward over packed segments, with the relative position bias of bias.cuh.
//
// A thread block takes up to WARPS row blocks of queries of one sample and head, a warp each, and walks all keys of the
// sample in tiles of KEYS rows: softmax in base 2, renormalised whenever a row's largest score has grown by HEADROOM.
// Scores start from their bias, and the matrix product adds the rest. With an order, tiles that no query of the thread
// block sees are not loaded, and a warp leaves out those that none of its queries sees. Keys and values of the next
// tile are copied while one is computed. CLS rows of all modalities form narrow tiles apart: 256 patches and CLS take
// 17 row blocks of queries, and 4 tiles of 64 and one of 16 keys.

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <algorithm>
#include <cmath>

#include "bias.cuh"
#include "forward_memory.cuh"
#include "launch.cuh"
#include "query_walk.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {
namespace {

constexpr float LN_2 = 0.6931471805599453f;
constexpr float HEADROOM = 8.f;  // probabilities are at most 2^8 times too large, which every type holds

// A warp's 16 rows of the output so far, not yet divided by their sums of probabilities. A thread holds parts of rows
// lane / 4 and lane / 4 + 8.
template <typename T, typename Launch>
struct OutputRows {
    static constexpr int VALUE_DIM = Launch::VALUE_DIM;

    float result[VALUE_DIM / 8][4] = {};

    template <bool WINDOWED>
    __device__ explicit OutputRows(const Forward<T, Launch, WINDOWED>& forward) {
        forward.shared.row_states[thread_index()] = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
    }

    // Take in a tile of keys: its scores become probabilities relative to the row's reference.
    template <int COLUMNS, bool WINDOWED>
    __device__ __forceinline__ void attend(
        float (&scores)[COLUMNS / 8][4], const Forward<T, Launch, WINDOWED>& forward, int stage) {
        const T* values = forward.shared.values[stage];
        RowState& state = forward.shared.row_states[thread_index()];
        const int lane = thread_index() % WARP;
        const float scale = score_scale(forward.arguments);
        float reference[2], sum[2], most[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            reference[i] = state.reference[i];
            sum[i] = state.sum[i];
            most[i] = -INFINITY;
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n) {
                most[i] = fmaxf(most[i], fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
            }
            most[i] = scale * row_max(most[i]);
        }
        const bool grows = most[0] > reference[0] + HEADROOM || most[1] > reference[1] + HEADROOM;
        if (__ballot_sync(0xffffffff, grows)) rescale(reference, sum, state, most);
        for (int i = 0; i < 2; ++i) {
            if (reference[i] == -INFINITY) reference[i] = 0.f;  // a row that a bias of -inf masks so far
        }
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float& score = scores[2 * k + i / 4][i % 4];
                score = fast_exp2(scale * score - reference[i % 4 / 2]);
                sum[i % 4 / 2] += score;
            }
            uint32_t a[4];
            left_operand<T>(a, scores[2 * k], scores[2 * k + 1]);
#pragma unroll
            for (int j = 0; j < VALUE_DIM / 16; ++j) {
                uint32_t b[4];
                right_operand<VALUE_DIM>(b, values, lane, k, j);
                mma<T>(result[2 * j], a, b[0], b[1]);
                mma<T>(result[2 * j + 1], a, b[2], b[3]);
            }
        }
        for (int i = 0; i < 2; ++i) state.sum[i] = sum[i];
    }

    // Of rows whose largest score has outgrown their reference.
    __device__ __forceinline__ void rescale(
        float (&reference)[2], float (&sum)[2], RowState& state, const float (&most)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool grows = most[i] > reference[i] + HEADROOM;
            const float factor = grows ? fast_exp2(reference[i] - most[i]) : 1.f;
            if (grows) state.reference[i] = reference[i] = most[i];
            sum[i] *= factor;
#pragma unroll
            for (int n = 0; n < VALUE_DIM / 8; ++n) {
                result[n][2 * i] *= factor;
                result[n][2 * i + 1] *= factor;
            }
        }
    }

    // Store the rows through the memory that held their queries: out [rows, heads, VALUE_DIM], log_sum_exp [rows,
    // heads].
    template <bool WINDOWED>
    __device__ __forceinline__ void store(
        const Forward<T, Launch, WINDOWED>& forward, T* out, float* log_sum_exp) {
        const RelativeBiasAttention& arguments = forward.arguments;
        const int warp = thread_index() / WARP, lane = thread_index() % WARP;
        T* staged = forward.shared.queries[warp];
        const RowBlock& row_block = forward.shared.query_rows[warp];
        const RowState& state = forward.shared.row_states[thread_index()];
        const float head_scale =
            arguments.head_scale ? load_element(arguments.head_scale, arguments.head_scale_type, blockIdx.y) : 1.f;
        const BlockRows block_rows(forward.shared.sample, arguments.modalities, row_block);
        float total[2];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            total[i] = row_sum(state.sum[i]);
            const float factor = total[i] == 0.f ? 0.f : head_scale / total[i];  // 0: it sees no key
            T* target = staged + swizzled<VALUE_DIM>(lane / 4 + 8 * i, 0) + 2 * (lane % 4);
#pragma unroll
            for (int n = 0; n < VALUE_DIM / 8; ++n) {
                *reinterpret_cast<uint32_t*>(staged + chunk_offset<VALUE_DIM>(target - staged, n)) =
                    pack<T>(result[n][2 * i] * factor, result[n][2 * i + 1] * factor);
            }
        }
        const int below = lane % 4, mine = lane / 4 + 8 * below;  // two of four lanes have a row each
        if (below < 2 && mine < row_block.count) {
            log_sum_exp[block_rows[mine] * arguments.heads + blockIdx.y] =
                LN_2 * state.reference[below] + logf(below ? total[1] : total[0]);
        }
        constexpr int LANES = VALUE_DIM / CHUNK;  // of a row
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < row_block.count * LANES; i += WARP) {
            const int r = i / LANES, chunk = i % LANES;
            T* target = out + (block_rows[r] * arguments.heads + blockIdx.y) * VALUE_DIM + chunk * CHUNK;
            *reinterpret_cast<uint4*>(target) =
                *reinterpret_cast<const uint4*>(staged + swizzled<VALUE_DIM>(r, chunk));
        }
    }
};

// Rows of out [rows, heads, VALUE_DIM] and log_sum_exp [rows, heads] past the last sample are zero; the thread blocks
// past the last sample share them.
template <typename T, typename Launch>
__device__ void zero_inert_rows(const RelativeBiasAttention& arguments, T* out, float* log_sum_exp) {
    constexpr int VALUE_DIM = Launch::VALUE_DIM, LANES = VALUE_DIM / CHUNK, THREADS = Launch::THREADS;
    const int first = find_end(arguments.queries, arguments.samples);
    share_rows<LANES, THREADS>(first, arguments.queries.rows, [&](int64_t row, int chunk) {
        const int64_t index = row * arguments.heads + blockIdx.y;
        *reinterpret_cast<uint4*>(out + index * VALUE_DIM + chunk * CHUNK) = uint4{0, 0, 0, 0};
        if (chunk == 0) log_sum_exp[index] = 0.f;
    });
}

// The forward pass. Thread blocks: parts that share the queries of a sample, heads, samples and one more.
//
//     heads of                       32         64         96     128/64        128   of keys/of values
//     queries x keys           144 x 64   144 x 64   144 x 48   144 x 32   128 x 32   of a tile
//     warps                           9          9          9          9          8
//     registers, sm_80          88, 110    96, 128    96, 138    90, 101   125, 145   the second with windows
//     registers, sm_90a         90, 113    96, 135    96, 139    96, 107   128, 156
//     shared memory              33,600     59,200     72,256     68,928     72,384   bytes, and 4 for each entry
//     thread blocks                2, 1       2, 1       2, 1       2, 1       2, 1   of a multiprocessor of 9.0
//     issue slots                   426        531        524        418        444   of a warp's tile and next load
//     shared memory is busy        128        208        233        181        210   cycles, for the same
//     codes in any order         63, 21     63, 21     48, 16     33, 11     33, 11   of either more
//
// With heads of 96, tiles of 64 keys spill, and tiles of 32 keys issue 6% to 19% more at 72 to 1025 tokens.
//
// Registers by ptxas of nvcc 13.0, no spills. Slots and cycles are those of tools/count_cuda.py for sm_90a and codes in
// runs; a multiprocessor has 4 slots in a cycle. For heads of 64, shared memory bounds it, at 257 tokens issue slots
// nearly as much, and device memory never.
template <typename T, int HEAD_DIM, int VALUE_DIM, bool WINDOWED>
__global__ void __launch_bounds__(
    (ForwardLaunch<HEAD_DIM, VALUE_DIM>::THREADS),
    (ForwardLaunch<HEAD_DIM, VALUE_DIM>::thread_blocks_at_once(WINDOWED)))
attention_forward_kernel(
    const __grid_constant__ RelativeBiasAttention arguments,
    T* out,              // [rows, heads, VALUE_DIM]
    float* log_sum_exp,  // [rows, heads]
    int bias_capacity) {
    using Launch = ForwardLaunch<HEAD_DIM, VALUE_DIM>;
    if (static_cast<int>(blockIdx.z) == arguments.samples) {
        return zero_inert_rows<T, Launch>(arguments, out, log_sum_exp);
    }
    auto& shared = *static_cast<ForwardShared<T, Launch>*>(shared_memory());
    const Forward<T, Launch, WINDOWED> forward{arguments, shared};
    read_sample<Launch::KEYS>(shared.sample, shared.key_sample, arguments, blockIdx.z);
    walk_queries<OutputRows<T, Launch>>(forward, bias_capacity, [&](OutputRows<T, Launch>& rows) {
        rows.store(forward, out, log_sum_exp);
    });
}

template <typename Launch>
LaunchPlan plan(const BiasPlan& bias) {
    return {
        Launch::THREADS, Launch::thread_blocks_at_once(bias.is_windowed), forward_shared_bytes<Launch>(bias.capacity)};
}

template <typename T, int HEAD_DIM, int VALUE_DIM>
const char* launch(const RelativeBiasAttention& arguments, void* out, float* log_sum_exp, void* stream) {
    using Launch = ForwardLaunch<HEAD_DIM, VALUE_DIM>;
    // Each modality may have one row block that is not full, and CLS needs one more; a longer sample than is said is
    // walked by the same thread blocks in several rounds.
    const PackedRows& queries = arguments.queries;
    const int64_t mean = arguments.samples ? queries.rows / arguments.samples : 0;
    const int64_t length = std::min<int64_t>(queries.max_length ? queries.max_length : 2 * mean, queries.rows);
    const int64_t row_blocks = (length + (BLOCK_ROWS - 1) * arguments.modalities) / BLOCK_ROWS + 1;
    const int parts = ceil_div(static_cast<int>(row_blocks), Launch::WARPS);
    int64_t entries = 0;
    for (int m = 0; m < arguments.bias_vectors; ++m) entries += arguments.bias[m].entries - CLS_ENTRIES;
    const BiasPlan bias = plan_bias<Launch>(entries, shared_limit(arguments.device));
    const LaunchPlan planned = plan<Launch>(bias);
    RelativeBiasAttention base_2 = arguments;
    base_2.scale *= LOG2_E;
    const auto kernel = bias.is_windowed ? attention_forward_kernel<T, HEAD_DIM, VALUE_DIM, true>
                                         : attention_forward_kernel<T, HEAD_DIM, VALUE_DIM, false>;
    return launch_kernel(
        kernel, arguments.device, dim3(parts, arguments.heads, arguments.samples + 1), planned.threads,
        planned.shared_bytes, stream, base_2, static_cast<T*>(out), log_sum_exp, bias.capacity);
}

template <typename T>
const char* launch_type(const RelativeBiasAttention& arguments, void* out, float* log_sum_exp, void* stream) {
    return with_head_sizes(arguments.head_dim, arguments.value_dim, [&](auto head_dim, auto value_dim) {
        return launch<T, head_dim.value, value_dim.value>(arguments, out, log_sum_exp, stream);
    });
}

}  // namespace

LaunchPlan relative_bias_attention_forward_plan(
    int32_t head_dim, int32_t value_dim, int64_t bias_entries, int64_t shared_limit) {
    return with_head_sizes(head_dim, value_dim, [&](auto head_size, auto value_size) {
        using Launch = ForwardLaunch<head_size.value, value_size.value>;
        return plan<Launch>(plan_bias<Launch>(bias_entries, shared_limit));
    });
}

const char* relative_bias_attention_forward(
    const RelativeBiasAttention& arguments, void* out, float* log_sum_exp, void* stream) {
    if (const char* problem = check_arguments(arguments)) return problem;
    if (const char* problem = check_address("out", out)) return problem;
    if (arguments.queries.rows == 0) return nullptr;
    return arguments.type == FLOAT16 ? launch_type<float16>(arguments, out, log_sum_exp, stream)
                                     : launch_type<bfloat16>(arguments, out, log_sum_exp, stream);
}

}  // namespace onepeace_fast

// Flash attention forward over packed segments, with the relative position bias of bias.cuh.
//
// A thread block takes row blocks of queries of one sample and head, each warp up to ROW_BLOCKS of them, and walks all
// keys of the sample in tiles of KEYS rows: softmax in base 2, renormalised whenever a row's largest score has grown by
// HEADROOM. Scores start from their bias, and the matrix product adds the rest. With an order, tiles that no query of
// the thread block sees are not loaded, and a warp leaves out those that none of its queries sees. Keys and values of
// the next tile are copied while one is computed. CLS rows of all modalities form narrow tiles apart: 256 patches and
// CLS take 17 row blocks of queries, and 4 tiles of 64 and one of 16 keys.

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

// A warp's row blocks of the output so far, not yet divided by their sums of probabilities. A thread holds parts of
// rows lane / 4 and lane / 4 + 8 of each.
template <typename T, typename Launch>
struct OutputRows {
    static constexpr int VALUE_DIM = Launch::VALUE_DIM, ROW_BLOCKS = Launch::ROW_BLOCKS;

    float result[ROW_BLOCKS][VALUE_DIM / 8][4] = {};

    template <bool WINDOWED>
    __device__ explicit OutputRows(const Forward<T, Launch, WINDOWED>& forward) {
        for (auto& states : forward.shared.row_states) states[thread_index()] = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
    }

    // Take in a tile of keys: its scores become probabilities relative to the row's reference.
    template <int COLUMNS, bool WINDOWED>
    __device__ __forceinline__ void attend(
        float (&scores)[ROW_BLOCKS][COLUMNS / 8][4], const Forward<T, Launch, WINDOWED>& forward, int stage) {
        const T* values = forward.shared.values[stage];
        auto& row_states = forward.shared.row_states;
        const int lane = thread_index() % WARP;
        const float scale = score_scale(forward.arguments);
        float reference[ROW_BLOCKS][2], sum[ROW_BLOCKS][2], most[ROW_BLOCKS][2];
        bool grows = false;
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
            const RowState state = row_states[block][thread_index()];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                reference[block][i] = state.reference[i];
                sum[block][i] = state.sum[i];
                float largest = -INFINITY;
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; ++n) {
                    largest = fmaxf(largest, fmaxf(scores[block][n][2 * i], scores[block][n][2 * i + 1]));
                }
                most[block][i] = scale * row_max(largest);
                grows |= most[block][i] > reference[block][i] + HEADROOM;
            }
        }
        if (__ballot_sync(0xffffffff, grows)) {
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS; ++i) {
                rescale(result[i], reference[i], sum[i], row_states[i][thread_index()], most[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * ROW_BLOCKS; ++i) {
            float& of_row = reference[i / 2][i % 2];
            if (of_row == -INFINITY) of_row = 0.f;  // a row that a bias of -inf masks so far
        }
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) {
            uint32_t a[ROW_BLOCKS][4];
#pragma unroll
            for (int block = 0; block < ROW_BLOCKS; ++block) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float& score = scores[block][2 * k + i / 4][i % 4];
                    score = fast_exp2(scale * score - reference[block][i % 4 / 2]);
                    sum[block][i % 4 / 2] += score;
                }
                left_operand<T>(a[block], scores[block][2 * k], scores[block][2 * k + 1]);
            }
#pragma unroll
            for (int j = 0; j < VALUE_DIM / 16; ++j) {
                uint32_t b[4];
                right_operand<VALUE_DIM>(b, values, lane, k, j);
#pragma unroll
                for (int i = 0; i < ROW_BLOCKS; ++i) {
                    mma<T>(result[i][2 * j], a[i], b[0], b[1]);
                    mma<T>(result[i][2 * j + 1], a[i], b[2], b[3]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * ROW_BLOCKS; ++i) row_states[i / 2][thread_index()].sum[i % 2] = sum[i / 2][i % 2];
    }

    // Of a row block, rows whose largest score has outgrown their reference.
    __device__ static __forceinline__ void rescale(
        float (&result)[VALUE_DIM / 8][4], float (&reference)[2], float (&sum)[2], RowState& state,
        const float (&most)[2]) {
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

    // Store a row block through the memory that held its queries: out [rows, heads, VALUE_DIM], log_sum_exp [rows,
    // heads].
    template <bool WINDOWED>
    __device__ __forceinline__ void store(
        const Forward<T, Launch, WINDOWED>& forward, int block, T* out, float* log_sum_exp) {
        const RelativeBiasAttention& arguments = forward.arguments;
        const int query_block = forward.first_query_block() + block, lane = thread_index() % WARP;
        T* staged = forward.shared.queries[query_block];
        const RowBlock& row_block = forward.shared.query_rows[query_block];
        const RowState& state = forward.shared.row_states[block][thread_index()];
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
                    pack<T>(result[block][n][2 * i] * factor, result[block][n][2 * i + 1] * factor);
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
//     queries x keys           160 x 64   160 x 64   128 x 48   128 x 48   128 x 32   of a tile
//     warps                           5          5          4          4          4   each of 32 queries
//     registers, sm_80              155        168        210        186        221
//     registers, sm_90a             157        168        210        190        222
//     shared memory              35,136     61,760     68,416     76,608     72,256   bytes, and 4 for each entry
//     issue slots                   741        901        884        912        755   of a warp's tile and next load
//     shared memory is busy         183        279        313        332        283   cycles, for the same
//     codes in any order        123, 42    123, 42     93, 32     93, 32     63, 22   of either more
//
//   compact, of which a multiprocessor has one thread block in place of two:
//     queries x keys           144 x 64   144 x 64   144 x 48   144 x 32   128 x 32
//     warps                           9          9          9          9          8   each of 16 queries
//     registers, sm_80          94, 110   121, 128   115, 134    88, 102   128, 144   the second with windows
//     registers, sm_90a         90, 112   123, 134   120, 139    96, 107   131, 155
//     shared memory              33,600     59,200     72,256     68,928     72,384
//
// Registers by ptxas of nvcc 13.0, no spills. Slots and cycles are those of tools/count_cuda.py for sm_90a and codes in
// runs; a multiprocessor has 4 slots in a cycle. For heads of 64, issue slots bound it at 257 tokens, shared memory at
// 1025, and device memory never. Two row blocks, each in a warp of its own, would take 1074 slots and 416 cycles.
template <typename T, int HEAD_DIM, int VALUE_DIM, bool COMPACT, bool WINDOWED>
__global__ void __launch_bounds__(
    (ForwardLaunch<HEAD_DIM, VALUE_DIM, COMPACT>::THREADS), (ForwardLaunch<HEAD_DIM, VALUE_DIM, COMPACT>::AT_ONCE))
attention_forward_kernel(
    const __grid_constant__ RelativeBiasAttention arguments,
    T* out,              // [rows, heads, VALUE_DIM]
    float* log_sum_exp,  // [rows, heads]
    int bias_capacity) {
    using Launch = ForwardLaunch<HEAD_DIM, VALUE_DIM, COMPACT>;
    if (static_cast<int>(blockIdx.z) == arguments.samples) {
        return zero_inert_rows<T, Launch>(arguments, out, log_sum_exp);
    }
    auto& shared = *static_cast<ForwardShared<T, Launch>*>(shared_memory());
    const Forward<T, Launch, WINDOWED> forward{arguments, shared};
    read_sample<Launch::KEYS>(shared.sample, shared.key_sample, arguments, blockIdx.z);
    walk_queries<OutputRows<T, Launch>>(forward, bias_capacity, [&](OutputRows<T, Launch>& rows) {
#pragma unroll
        for (int i = 0; i < Launch::ROW_BLOCKS; ++i) rows.store(forward, i, out, log_sum_exp);
    });
}

template <typename T, int HEAD_DIM, int VALUE_DIM>
const char* launch(const RelativeBiasAttention& arguments, void* out, float* log_sum_exp, void* stream) {
    // Each modality may have one row block that is not full, and CLS needs one more; a longer sample than is said is
    // walked by the same thread blocks in several rounds.
    const PackedRows& queries = arguments.queries;
    const int64_t mean = arguments.samples ? queries.rows / arguments.samples : 0;
    const int64_t length = std::min<int64_t>(queries.max_length ? queries.max_length : 2 * mean, queries.rows);
    const int64_t row_blocks = (length + (BLOCK_ROWS - 1) * arguments.modalities) / BLOCK_ROWS + 1;
    int64_t entries = 0;
    for (int m = 0; m < arguments.bias_vectors; ++m) entries += arguments.bias[m].entries - CLS_ENTRIES;
    const ForwardPlan plan = choose_forward_plan<HEAD_DIM, VALUE_DIM>(entries, shared_limit(arguments.device));
    RelativeBiasAttention base_2 = arguments;
    base_2.scale *= LOG2_E;
    const auto kernel = plan.is_large     ? attention_forward_kernel<T, HEAD_DIM, VALUE_DIM, true, true>
                        : plan.is_compact ? attention_forward_kernel<T, HEAD_DIM, VALUE_DIM, true, false>
                                          : attention_forward_kernel<T, HEAD_DIM, VALUE_DIM, false, false>;
    const int parts = ceil_div(static_cast<int>(row_blocks), plan.query_blocks);
    return launch_kernel(
        kernel, arguments.device, dim3(parts, arguments.heads, arguments.samples + 1), plan.launch.threads,
        plan.launch.shared_bytes, stream, base_2, static_cast<T*>(out), log_sum_exp, plan.bias_capacity);
}

template <typename T>
const char* launch_type(const RelativeBiasAttention& arguments, void* out, float* log_sum_exp, void* stream) {
    return with_head_sizes(arguments.head_dim, arguments.value_dim, [&](auto head_dim, auto value_dim) {
        return launch<T, head_dim.value, value_dim.value>(arguments, out, log_sum_exp, stream);
    });
}

}  // namespace

ForwardPlan relative_bias_attention_forward_plan(
    int32_t head_dim, int32_t value_dim, int64_t bias_entries, int64_t shared_limit) {
    return with_head_sizes(head_dim, value_dim, [&](auto head_size, auto value_size) {
        return choose_forward_plan<head_size.value, value_size.value>(bias_entries, shared_limit);
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

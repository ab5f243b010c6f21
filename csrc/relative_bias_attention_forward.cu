// Flash attention forward over packed segments, with the relative position bias of bias.cuh.
//
// A thread block takes up to WARPS blocks of 16 query rows of one sample and head, a warp each, and walks all keys of
// the sample in tiles of KEYS rows: softmax in base 2, renormalised whenever a row's largest score grows. Keys and
// values of the next tile are copied while one is computed. CLS rows of all modalities form narrow blocks apart: 256
// patches and CLS take 17 blocks of queries, and 4 tiles and 16 columns of keys.

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <algorithm>
#include <cmath>

#include "bias.cuh"
#include "launch.cuh"
#include "relative_bias_attention.h"
#include "relative_bias_attention_forward.cuh"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {
namespace {

constexpr float LN_2 = 0.6931471805599453f;

// 16 query rows of a warp and what they attended to so far. A thread holds parts of rows lane / 4 and 8 below.
template <typename T, int HEAD_DIM>
struct Rows {
    float result[HEAD_DIM / 8][4] = {};

    template <int COLUMNS>
    __device__ __forceinline__ void multiply(float (&scores)[COLUMNS / 8][4], const T* queries, const T* keys) const {
        const int lane = thread_index() % WARP;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; ++k) {
            uint32_t a[4];
            left_operand<HEAD_DIM>(a, queries, lane, 0, k);
#pragma unroll
            for (int j = 0; j < COLUMNS / 16; ++j) {
                uint32_t b[4];
                transposed_right_operand<HEAD_DIM>(b, keys, lane, j, k);
                mma<T>(scores[2 * j], a, b[0], b[1]);
                mma<T>(scores[2 * j + 1], a, b[2], b[3]);
            }
        }
    }

    template <int COLUMNS>
    __device__ __forceinline__ static void mask(float (&scores)[COLUMNS / 8][4], int count) {
        const int column = 2 * (thread_index() % 4);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (8 * n + column + i % 2 >= count) scores[n][i] = -INFINITY;
            }
        }
    }

    // Take in a tile of keys: its scores, base 2, become probabilities relative to the largest so far.
    template <int COLUMNS>
    __device__ __forceinline__ void attend(float (&scores)[COLUMNS / 8][4], const T* values, Softmax& softmax) {
        const int lane = thread_index() % WARP;
        float reference[2], sum[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float most = softmax.largest[i];
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n) most = fmaxf(most, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
            most = row_max(most);
            reference[i] = most == -INFINITY ? 0.f : most;  // a row that a bias of -inf masks so far
            const float factor = fast_exp2(softmax.largest[i] - reference[i]);
            softmax.largest[i] = most;
            sum[i] = softmax.sum[i] * factor;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                result[n][2 * i] *= factor;
                result[n][2 * i + 1] *= factor;
            }
        }
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float& score = scores[2 * k + i / 4][i % 4];
                score = fast_exp2(score - reference[i % 4 / 2]);
                sum[i % 4 / 2] += score;
            }
            uint32_t a[4];
            left_operand<T>(a, scores[2 * k], scores[2 * k + 1]);
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 16; ++j) {
                uint32_t b[4];
                right_operand<HEAD_DIM>(b, values, lane, k, j);
                mma<T>(result[2 * j], a, b[0], b[1]);
                mma<T>(result[2 * j + 1], a, b[2], b[3]);
            }
        }
        for (int i = 0; i < 2; ++i) softmax.sum[i] = sum[i];
    }

    // Store the rows through the memory that held their queries.
    template <bool WINDOWED>
    __device__ __forceinline__ void store(
        const Forward<T, HEAD_DIM, WINDOWED>& forward, T* out, float* log_sum_exp) {
        const RelativeBiasAttention& arguments = forward.arguments;
        const int warp = thread_index() / WARP, lane = thread_index() % WARP;
        T* staged = forward.shared.rows[warp];
        const Block& block = forward.shared.blocks[warp];
        const Softmax& softmax = forward.shared.softmax[thread_index()];
        const float head_scale =
            arguments.head_scale ? load_element(arguments.head_scale, arguments.head_scale_type, blockIdx.y) : 1.f;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float total = row_sum(softmax.sum[i]), factor = head_scale / total;
            const int r = lane / 4 + 8 * i;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                T* target = staged + swizzled<HEAD_DIM>(r, n) + 2 * (lane % 4);
                *reinterpret_cast<uint32_t*>(target) =
                    pack<T>(result[n][2 * i] * factor, result[n][2 * i + 1] * factor);
            }
            if (lane % 4 == 0 && r < block.count) {
                const int64_t index = find_row(forward.shared.sample, arguments.modalities, block, r).index;
                log_sum_exp[index * arguments.heads + blockIdx.y] = LN_2 * softmax.largest[i] + logf(total);
            }
        }
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < block.count * (HEAD_DIM / CHUNK); i += WARP) {
            const int r = i / (HEAD_DIM / CHUNK), chunk = i % (HEAD_DIM / CHUNK);
            const int64_t index = find_row(forward.shared.sample, arguments.modalities, block, r).index;
            T* target = out + (index * arguments.heads + blockIdx.y) * HEAD_DIM + chunk * CHUNK;
            *reinterpret_cast<uint4*>(target) =
                *reinterpret_cast<const uint4*>(staged + swizzled<HEAD_DIM>(r, chunk));
        }
    }
};

// Turn a warp's scores to base 2 and add their bias, but for the entries of a windowed vector.
template <int COLUMNS, typename T, int HEAD_DIM, bool WINDOWED>
__device__ __forceinline__ void bias_tile(
    float (&scores)[COLUMNS / 8][4], const Forward<T, HEAD_DIM, WINDOWED>& forward, int stage) {
    const RelativeBiasAttention& arguments = forward.arguments;
    auto& shared = forward.shared;
    const float scale = arguments.scale;
    const int warp = thread_index() / WARP, row = thread_index() % WARP / 4;
    const int mine = shared.blocks[warp].modality, modality = shared.tiles[stage].modality;
    const int* row_code = shared.row_code[warp];
    const int* key_code = shared.key_code[stage];
    const bool is_cls = mine == arguments.modalities;
    const int first = is_cls ? row_code[row] : mine, second = is_cls ? row_code[row + 8] : mine;
    if (!arguments.bias_vectors) {
        add_row_bias<COLUMNS>(scores, scale, 0.f, 0.f);
    } else if (COLUMNS == BLOCK_ROWS) {
        const ClsEntry entry = is_cls ? CLS_AS_BOTH : CLS_AS_KEY;
        add_cls_bias<COLUMNS>(
            scores, scale, key_code, first, second, shared.cls[first][entry], shared.cls[second][entry]);
    } else if (is_cls) {
        const float bias = shared.cls[modality][CLS_AS_QUERY];
        add_row_bias<COLUMNS>(scores, scale, first == modality ? bias : 0.f, second == modality ? bias : 0.f);
    } else if (mine != modality || WINDOWED) {
        add_row_bias<COLUMNS>(scores, scale, 0.f, 0.f);
    } else {
        const float* entries = shared.bias();
        const int shift = shared.bias_start[modality] + arguments.bias[modality].code_offset;
        add_bias<COLUMNS>(scores, scale, row_code, key_code, shift, [&](int entry) { return entries[entry]; });
    }
}

// Add the entries of a windowed vector; all warps of the thread block load, those with queries of the modality add.
template <int COLUMNS, typename T, int HEAD_DIM>
__device__ __forceinline__ void add_windows(
    float (&scores)[COLUMNS / 8][4], const Forward<T, HEAD_DIM, true>& forward, int stage, int capacity) {
    auto& shared = forward.shared;
    const int warp = thread_index() / WARP;
    const Block& mine = shared.blocks[warp];
    const float* entries = forward.shared.bias();
    const int modality = shared.tiles[stage].modality;
    const Range range = forward.find_entries(stage, modality);
    for (int first = range.first; first <= range.last; first += capacity) {
        const int count = min(capacity, range.last - first + 1);
        if (first > range.first) __syncthreads();  // nobody reads the window before
        forward.load_window(modality, first, count);
        __syncthreads();
        if (mine.count && mine.modality == modality) {
            add_bias<COLUMNS>(
                scores, 1.f, shared.row_code[warp], shared.key_code[stage],
                forward.arguments.bias[modality].code_offset - first,
                [&](int entry) { return entry >= 0 && entry < count ? entries[entry] : 0.f; });
        }
    }
}

// By all warps: those without queries only load windows.
template <int COLUMNS, typename T, int HEAD_DIM, bool WINDOWED>
__device__ __forceinline__ void attend_tile(
    Rows<T, HEAD_DIM>& rows, const Forward<T, HEAD_DIM, WINDOWED>& forward, int stage, int bias_capacity) {
    auto& shared = forward.shared;
    float scores[COLUMNS / 8][4] = {};
    if (shared.blocks[thread_index() / WARP].count) {
        rows.template multiply<COLUMNS>(scores, shared.rows[thread_index() / WARP], shared.keys[stage]);
        bias_tile<COLUMNS>(scores, forward, stage);
    }
    if constexpr (WINDOWED && COLUMNS == ForwardLaunch<HEAD_DIM>::KEYS) {
        add_windows<COLUMNS>(scores, forward, stage, bias_capacity);
    }
    if (shared.blocks[thread_index() / WARP].count) {
        const int count = shared.tiles[stage].count;
        if (count < COLUMNS) rows.template mask<COLUMNS>(scores, count);
        rows.template attend<COLUMNS>(scores, shared.values[stage], shared.softmax[thread_index()]);
    }
}

// Rows past the last sample are zero; the thread blocks past the last sample share them.
template <typename T, int HEAD_DIM>
__device__ void zero_inert_rows(const RelativeBiasAttention& arguments, T* out, float* log_sum_exp) {
    const int end = arguments.cu_seqlens[static_cast<int64_t>(arguments.modalities) * (arguments.samples + 1) - 1];
    constexpr int LANES = HEAD_DIM / CHUNK, ROWS = ForwardLaunch<HEAD_DIM>::THREADS / LANES;
    const int chunk = thread_index() % LANES;
    int64_t row = end + blockIdx.x * ROWS + thread_index() / LANES;
    for (; row < arguments.rows; row += gridDim.x * ROWS) {
        const int64_t index = row * arguments.heads + blockIdx.y;
        *reinterpret_cast<uint4*>(out + index * HEAD_DIM + chunk * CHUNK) = uint4{0, 0, 0, 0};
        if (chunk == 0) log_sum_exp[index] = 0.f;
    }
}

// Thread blocks: parts that share the queries of a sample, heads, samples and one more.
template <typename T, int HEAD_DIM, bool WINDOWED>
__global__ void __launch_bounds__(ForwardLaunch<HEAD_DIM>::THREADS, ForwardLaunch<HEAD_DIM>::at_once(WINDOWED))
forward_kernel(
    const __grid_constant__ RelativeBiasAttention arguments, T* out, float* log_sum_exp, int bias_capacity) {
    constexpr int WARPS = ForwardLaunch<HEAD_DIM>::WARPS, KEYS = ForwardLaunch<HEAD_DIM>::KEYS;
    if (static_cast<int>(blockIdx.z) == arguments.samples) {
        return zero_inert_rows<T, HEAD_DIM>(arguments, out, log_sum_exp);
    }
    auto& shared = *static_cast<ForwardShared<T, HEAD_DIM>*>(shared_memory());
    const Forward<T, HEAD_DIM, WINDOWED> forward{arguments, shared};
    read_sample<KEYS>(shared.sample, arguments, blockIdx.z);
    forward.describe_bias();
    if (thread_index() == 0) shared.query_tile = blockIdx.x;
    __syncthreads();
    while (true) {
        // What the loop over keys does not need stays in shared memory.
        const int row_blocks = shared.sample.row_blocks, query_tiles = ceil_div(row_blocks, WARPS);
        const int query_tile = shared.query_tile;
        if (query_tile >= query_tiles) break;
        const int first_block = query_tile * row_blocks / query_tiles;
        const int end_block = (query_tile + 1) * row_blocks / query_tiles;
        const bool active = thread_index() / WARP < end_block - first_block;
        forward.load_keys(0, find_block(shared.sample, arguments.modalities, KEYS, 0));
        if (active) {
            forward.load_queries(
                find_block(shared.sample, arguments.modalities, BLOCK_ROWS, first_block + thread_index() / WARP));
        } else if (thread_index() % WARP == 0) {
            shared.blocks[thread_index() / WARP].count = 0;
        }
        if (!WINDOWED) forward.load_whole_bias(first_block, end_block);
        shared.softmax[thread_index()] = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
        Rows<T, HEAD_DIM> rows;
        for (int i = 0; i < shared.sample.key_tiles; ++i) {
            const int stage = i % STAGES;
            cp_async_wait_all();
            __syncthreads();  // this tile is there, and nobody reads the one before, whose place the next one takes
            if (i + 1 < shared.sample.key_tiles) {
                forward.load_keys(1 - stage, find_block(shared.sample, arguments.modalities, KEYS, i + 1));
            }
            if (shared.tiles[stage].modality == arguments.modalities) {
                attend_tile<BLOCK_ROWS>(rows, forward, stage, bias_capacity);
            } else {
                attend_tile<KEYS>(rows, forward, stage, bias_capacity);
            }
        }
        if (shared.blocks[thread_index() / WARP].count) rows.store(forward, out, log_sum_exp);
        if (thread_index() == 0) shared.query_tile += gridDim.x;
        __syncthreads();  // the next queries take the place of these keys and results
    }
}

template <int HEAD_DIM>
LaunchPlan plan(int64_t bias_entries) {
    const bool windowed = bias_entries > BIAS_CAPACITY;
    const auto bias = sizeof(float) * (windowed ? BIAS_CAPACITY : bias_entries);
    return {
        ForwardLaunch<HEAD_DIM>::THREADS, ForwardLaunch<HEAD_DIM>::at_once(windowed),
        static_cast<int32_t>(sizeof(ForwardShared<bfloat16, HEAD_DIM>) + bias)};
}

template <typename T, int HEAD_DIM>
const char* launch(const RelativeBiasAttention& arguments, void* out, float* log_sum_exp, void* stream) {
    // Each modality may have one unfilled block of rows, and CLS needs one more; a longer sample than is said is walked
    // by the same thread blocks in several rounds.
    const int64_t mean = arguments.samples ? arguments.rows / arguments.samples : 0;
    const int64_t length = arguments.max_length ? arguments.max_length : std::min<int64_t>(2 * mean, arguments.rows);
    const int64_t row_blocks = (length + (BLOCK_ROWS - 1) * arguments.modalities) / BLOCK_ROWS + 1;
    const int parts = ceil_div(static_cast<int>(row_blocks), ForwardLaunch<HEAD_DIM>::WARPS);
    int64_t entries = 0;
    for (int m = 0; m < arguments.bias_vectors; ++m) entries += arguments.bias[m].entries - CLS_ENTRIES;
    const LaunchPlan planned = plan<HEAD_DIM>(entries);
    RelativeBiasAttention base_2 = arguments;
    base_2.scale *= LOG2_E;
    return launch_kernel(
        entries > BIAS_CAPACITY ? forward_kernel<T, HEAD_DIM, true> : forward_kernel<T, HEAD_DIM, false>,
        arguments.device, dim3(parts, arguments.heads, arguments.samples + 1), planned.threads,
        planned.shared_bytes, stream, base_2, static_cast<T*>(out), log_sum_exp,
        static_cast<int>(std::min<int64_t>(entries, BIAS_CAPACITY)));
}

template <typename T>
const char* launch_type(const RelativeBiasAttention& arguments, void* out, float* log_sum_exp, void* stream) {
    if (arguments.head_dim == 32) return launch<T, 32>(arguments, out, log_sum_exp, stream);
    if (arguments.head_dim == 64) return launch<T, 64>(arguments, out, log_sum_exp, stream);
    return launch<T, 128>(arguments, out, log_sum_exp, stream);
}

}  // namespace

LaunchPlan relative_bias_attention_forward_plan(int32_t head_dim, int64_t bias_entries) {
    return head_dim == 32 ? plan<32>(bias_entries) : head_dim == 64 ? plan<64>(bias_entries) : plan<128>(bias_entries);
}

const char* relative_bias_attention_forward(
    const RelativeBiasAttention& arguments, void* out, float* log_sum_exp, void* stream) {
    if (const char* problem = check_arguments(arguments)) return problem;
    if (!is_aligned(out, 16)) return "out: got an address off 16 bytes, takes a multiple of 16; allocate it anew";
    if (arguments.rows == 0) return nullptr;
    return arguments.type == FLOAT16 ? launch_type<float16>(arguments, out, log_sum_exp, stream)
                                     : launch_type<bfloat16>(arguments, out, log_sum_exp, stream);
}

}  // namespace onepeace_fast

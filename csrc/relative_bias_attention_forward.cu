// Flash attention forward over packed segments, with the relative position bias of bias.cuh.
//
// A thread block takes up to WARPS blocks of 16 query rows of one sample and head, a warp each, and walks all keys of
// the sample in tiles of KEYS rows: softmax in base 2, renormalised whenever a row's largest score grows. Keys and
// values of the next tile are copied while one is computed. CLS rows of all modalities form narrow blocks apart, so that
// 256 patches and CLS take 17 blocks of queries and, of keys, 4 tiles and 16 columns.

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <climits>
#include <cmath>

#include "bias.cuh"
#include "launch.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {
namespace {

constexpr float LN_2 = 0.6931471805599453f;
constexpr int KEYS = 64;
constexpr int STAGES = 2;
constexpr int BIAS_CAPACITY = 7168;  // entries in shared memory; a grid of 42 x 42, or 1-D vectors of three modalities

// Warps of a thread block, and thread blocks that a multiprocessor holds at once.
template <int HEAD_DIM>
struct Launch {
    static constexpr int WARPS = 9;
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int AT_ONCE = HEAD_DIM == 128 ? 1 : 2;
};

template <typename T, int HEAD_DIM>
struct alignas(128) Shared {
    static constexpr int WARPS = Launch<HEAD_DIM>::WARPS;

    T keys[STAGES][KEYS * HEAD_DIM];
    T values[STAGES][KEYS * HEAD_DIM];
    T rows[WARPS][BLOCK_ROWS * HEAD_DIM];  // of each warp: its queries, at the end its results
    int key_code[STAGES][KEYS];            // of CLS keys: their modality
    int row_code[WARPS][BLOCK_ROWS];       // of CLS queries: their modality
    Block blocks[WARPS];                   // the queries of each warp, none where the count is 0
    Range codes[WARPS];                    // of body queries, where the bias is windowed
    Sample sample;
    float cls[MAX_MODALITIES][CLS_ENTRIES];
    int bias_start[MAX_MODALITIES];
    // float bias[bias_capacity] follows.

    __device__ float* bias() { return reinterpret_cast<float*>(this + 1); }
};

// One thread block's view of its sample and head.
template <typename T, int HEAD_DIM, bool WINDOWED>
struct Forward {
    using Memory = Shared<T, HEAD_DIM>;
    static constexpr int THREADS = Launch<HEAD_DIM>::THREADS;
    static constexpr int ROW_CHUNKS = HEAD_DIM / CHUNK;

    const RelativeBiasAttention& arguments;
    Memory& shared;
    const int head;
    const int thread = threadIdx.x;
    const int warp = thread / WARP;
    const int lane = thread % WARP;

    __device__ const T* source(int row, int which) const {
        return static_cast<const T*>(arguments.qkv) + row * arguments.row_stride + which * arguments.which_stride +
               head * arguments.head_stride;
    }

    // Begin to copy a tile's keys, values and codes; rows past its end become zero, lest 0 * NaN come in.
    __device__ __forceinline__ void load_keys(int stage, const Block& tile) const {
        const bool is_cls = tile.modality == arguments.modalities;
        const int rows = is_cls ? BLOCK_ROWS : KEYS;
#pragma unroll 1
        for (int i = thread; i < rows * ROW_CHUNKS; i += THREADS) {
            const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS, target = swizzled<HEAD_DIM>(row, chunk);
            const int from = find_row(shared.sample, arguments.modalities, tile, row).index;
            cp_async_16(shared.keys[stage] + target, source(from, 1) + chunk * CHUNK, row < tile.count);
            cp_async_16(shared.values[stage] + target, source(from, 2) + chunk * CHUNK, row < tile.count);
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
        for (int i = lane; i < BLOCK_ROWS * ROW_CHUNKS; i += WARP) {
            const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
            const int from = find_row(shared.sample, arguments.modalities, block, row).index;
            cp_async_16(
                shared.rows[warp] + swizzled<HEAD_DIM>(row, chunk), source(from, 0) + chunk * CHUNK, row < block.count);
        }
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
        if (thread < arguments.bias_vectors) {
            const int m = thread;
            int start = 0;
            for (int i = 0; i < m; ++i) start += arguments.bias[i].entries - CLS_ENTRIES;
            shared.bias_start[m] = start;
            for (int i = 0; i < CLS_ENTRIES; ++i) {
                shared.cls[m][i] = load_entry(arguments.bias[m], head, arguments.bias[m].entries - CLS_ENTRIES + i);
            }
        }
    }

    // Whole vectors of the modalities that have body rows among the blocks of queries.
    __device__ void load_whole_bias(int first_block, int end_block) const {
        for (int m = 0, start = 0; m < arguments.bias_vectors; ++m) {
            const int end = start + ceil_div(shared.sample.body[m], BLOCK_ROWS);
            if (start < end_block && end > first_block) {
                const BiasVector& vector = arguments.bias[m];
                for (int i = thread; i < vector.entries - CLS_ENTRIES; i += THREADS) {
                    shared.bias()[shared.bias_start[m] + i] = load_entry(vector, head, i);
                }
            }
            start = end;
        }
    }

    // First and last entry that a tile of keys can meet; none, first > last, without queries of its modality.
    __device__ Range find_entries(int stage, int modality) const {
        Range queries{INT_MAX, INT_MIN}, keys{INT_MAX, INT_MIN};
        for (int w = 0; w < Launch<HEAD_DIM>::WARPS; ++w) {
            if (shared.blocks[w].count && shared.blocks[w].modality == modality) queries.include(shared.codes[w]);
        }
        if (queries.first > queries.last) return queries;
        for (int i = lane; i < KEYS; i += WARP) {
            keys.include({shared.key_code[stage][i], shared.key_code[stage][i]});
        }
        keys.include_lanes();
        const int offset = arguments.bias[modality].code_offset;
        return {queries.first - keys.last + offset, queries.last - keys.first + offset};
    }

    __device__ void load_window(int modality, int first, int count) const {
        for (int i = thread; i < count; i += THREADS) {
            shared.bias()[i] = load_entry(arguments.bias[modality], head, first + i);
        }
    }
};

// 16 query rows of a warp: the left operands and the state of the softmax. A thread holds rows lane / 4 and 8 below.
template <typename T, int HEAD_DIM>
struct Rows {
    float largest[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.f, 0.f};  // of this thread's columns
    float result[HEAD_DIM / 8][4] = {};

    template <int COLUMNS>
    __device__ __forceinline__ void multiply(float (&scores)[COLUMNS / 8][4], const T* queries, const T* keys) const {
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; ++k) {
            uint32_t a[4];
            left_operand<HEAD_DIM>(a, queries, 0, k);
#pragma unroll
            for (int j = 0; j < COLUMNS / 16; ++j) {
                uint32_t b[4];
                transposed_right_operand<HEAD_DIM>(b, keys, j, k);
                mma<T>(scores[2 * j], a, b[0], b[1]);
                mma<T>(scores[2 * j + 1], a, b[2], b[3]);
            }
        }
    }

    template <int COLUMNS>
    __device__ __forceinline__ static void mask(float (&scores)[COLUMNS / 8][4], int count) {
        const int column = 2 * (threadIdx.x % 4);
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
    __device__ __forceinline__ void attend(float (&scores)[COLUMNS / 8][4], const T* values) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float most = largest[i];
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n) most = fmaxf(most, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
            most = row_max(most);
            const float reference = most == -INFINITY ? 0.f : most;  // a row that a bias of -inf masks so far
            const float factor = fast_exp2(largest[i] - reference);
            largest[i] = most;
            sum[i] *= factor;
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n) {
                scores[n][2 * i] = fast_exp2(scores[n][2 * i] - reference);
                scores[n][2 * i + 1] = fast_exp2(scores[n][2 * i + 1] - reference);
                sum[i] += scores[n][2 * i] + scores[n][2 * i + 1];
            }
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                result[n][2 * i] *= factor;
                result[n][2 * i + 1] *= factor;
            }
        }
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) {
            uint32_t a[4];
            left_operand<T>(a, scores[2 * k], scores[2 * k + 1]);
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 16; ++j) {
                uint32_t b[4];
                right_operand<HEAD_DIM>(b, values, k, j);
                mma<T>(result[2 * j], a, b[0], b[1]);
                mma<T>(result[2 * j + 1], a, b[2], b[3]);
            }
        }
    }

    // Store the rows through the memory that held their queries.
    template <bool WINDOWED>
    __device__ __forceinline__ void store(
        const Forward<T, HEAD_DIM, WINDOWED>& forward, T* out, float* log_sum_exp) {
        const RelativeBiasAttention& arguments = forward.arguments;
        T* staged = forward.shared.rows[forward.warp];
        const int lane = forward.lane;
        const Block& block = forward.shared.blocks[forward.warp];
        const float head_scale =
            arguments.head_scale ? load_element(arguments.head_scale, arguments.head_scale_type, forward.head) : 1.f;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float total = row_sum(sum[i]), factor = head_scale / total;
            const int r = lane / 4 + 8 * i;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                T* target = staged + swizzled<HEAD_DIM>(r, n) + 2 * (lane % 4);
                *reinterpret_cast<uint32_t*>(target) =
                    pack<T>(result[n][2 * i] * factor, result[n][2 * i + 1] * factor);
            }
            if (lane % 4 == 0 && r < block.count) {
                const int64_t index = find_row(forward.shared.sample, arguments.modalities, block, r).index;
                log_sum_exp[index * arguments.heads + forward.head] = LN_2 * largest[i] + logf(total);
            }
        }
        __syncwarp();
        for (int i = lane; i < block.count * (HEAD_DIM / CHUNK); i += WARP) {
            const int r = i / (HEAD_DIM / CHUNK), chunk = i % (HEAD_DIM / CHUNK);
            const int64_t index = find_row(forward.shared.sample, arguments.modalities, block, r).index;
            T* target = out + (index * arguments.heads + forward.head) * HEAD_DIM + chunk * CHUNK;
            *reinterpret_cast<uint4*>(target) =
                *reinterpret_cast<const uint4*>(staged + swizzled<HEAD_DIM>(r, chunk));
        }
    }
};

// Turn a warp's scores to base 2 and add their bias, but for the entries of a windowed vector.
template <int COLUMNS, typename T, int HEAD_DIM, bool WINDOWED>
__device__ __forceinline__ void bias_tile(
    float (&scores)[COLUMNS / 8][4], const Forward<T, HEAD_DIM, WINDOWED>& forward, int modality, int stage) {
    const RelativeBiasAttention& arguments = forward.arguments;
    auto& shared = forward.shared;
    const float scale = arguments.scale * LOG2_E;
    const int mine = shared.blocks[forward.warp].modality;
    const int* row_code = shared.row_code[forward.warp];
    const int* key_code = shared.key_code[stage];
    const bool is_cls = mine == arguments.modalities;
    const int row = forward.lane / 4, first = is_cls ? row_code[row] : mine, second = is_cls ? row_code[row + 8] : mine;
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
    float (&scores)[COLUMNS / 8][4], const Forward<T, HEAD_DIM, true>& forward, int modality, int stage, int capacity) {
    auto& shared = forward.shared;
    const Block& mine = shared.blocks[forward.warp];
    const float* entries = forward.shared.bias();
    const Range range = forward.find_entries(stage, modality);
    for (int first = range.first; first <= range.last; first += capacity) {
        const int count = min(capacity, range.last - first + 1);
        if (first > range.first) __syncthreads();  // nobody reads the window before
        forward.load_window(modality, first, count);
        __syncthreads();
        if (mine.count && mine.modality == modality) {
            add_bias<COLUMNS>(
                scores, 1.f, shared.row_code[forward.warp], shared.key_code[stage],
                forward.arguments.bias[modality].code_offset - first,
                [&](int entry) { return entry >= 0 && entry < count ? entries[entry] : 0.f; });
        }
    }
}

// By all warps: those without queries only load windows.
template <int COLUMNS, typename T, int HEAD_DIM, bool WINDOWED>
__device__ __forceinline__ void attend_tile(
    Rows<T, HEAD_DIM>& rows, const Forward<T, HEAD_DIM, WINDOWED>& forward, const Block& tile, int stage, bool active,
    int bias_capacity) {
    auto& shared = forward.shared;
    float scores[COLUMNS / 8][4] = {};
    if (active) {
        rows.template multiply<COLUMNS>(scores, shared.rows[forward.warp], shared.keys[stage]);
        bias_tile<COLUMNS>(scores, forward, tile.modality, stage);
    }
    if constexpr (WINDOWED && COLUMNS == KEYS) {
        add_windows<COLUMNS>(scores, forward, tile.modality, stage, bias_capacity);
    }
    if (active) {
        if (tile.count < COLUMNS) rows.template mask<COLUMNS>(scores, tile.count);
        rows.template attend<COLUMNS>(scores, shared.values[stage]);
    }
}

// Rows past the last sample are zero; the thread blocks past the last sample share them.
template <typename T, int HEAD_DIM>
__device__ void zero_inert_rows(
    const RelativeBiasAttention& arguments, T* out, float* log_sum_exp, int head, int part, int parts) {
    const int end = arguments.cu_seqlens[static_cast<int64_t>(arguments.modalities) * (arguments.samples + 1) - 1];
    const int lanes = HEAD_DIM / CHUNK, rows = blockDim.x / lanes, chunk = threadIdx.x % lanes;
    for (int64_t row = end + part * rows + threadIdx.x / lanes; row < arguments.rows; row += parts * rows) {
        const int64_t index = row * arguments.heads + head;
        *reinterpret_cast<uint4*>(out + index * HEAD_DIM + chunk * CHUNK) = uint4{0, 0, 0, 0};
        if (chunk == 0) log_sum_exp[index] = 0.f;
    }
}

// Thread blocks: samples and one more, times heads, times `parts` that share the queries of a sample.
template <typename T, int HEAD_DIM, bool WINDOWED>
__global__ void __launch_bounds__(Launch<HEAD_DIM>::THREADS, Launch<HEAD_DIM>::AT_ONCE) forward_kernel(
    const __grid_constant__ RelativeBiasAttention arguments, T* out, float* log_sum_exp, int parts, int bias_capacity) {
    constexpr int WARPS = Launch<HEAD_DIM>::WARPS;
    const int part = blockIdx.x % parts, head = blockIdx.x / parts % arguments.heads;
    const int index = blockIdx.x / parts / arguments.heads;
    if (index == arguments.samples) {
        zero_inert_rows<T, HEAD_DIM>(arguments, out, log_sum_exp, head, part, parts);
        return;
    }
    auto& shared = *static_cast<Shared<T, HEAD_DIM>*>(shared_memory());
    const Forward<T, HEAD_DIM, WINDOWED> forward{arguments, shared, head};
    read_sample(shared.sample, arguments, index);
    forward.describe_bias();
    __syncthreads();
    const int row_blocks = count_blocks(shared.sample, arguments.modalities, BLOCK_ROWS);
    const int key_tiles = count_blocks(shared.sample, arguments.modalities, KEYS);
    const int query_tiles = ceil_div(row_blocks, WARPS);
    for (int query_tile = part; query_tile < query_tiles; query_tile += parts) {
        const int first_block = query_tile * row_blocks / query_tiles;
        const int end_block = (query_tile + 1) * row_blocks / query_tiles, warps = end_block - first_block;
        const bool active = forward.warp < warps;
        forward.load_keys(0, find_block(shared.sample, arguments.modalities, KEYS, 0));
        if (active) {
            const Block block =
                find_block(shared.sample, arguments.modalities, BLOCK_ROWS, first_block + forward.warp);
            if (forward.lane == 0) shared.blocks[forward.warp] = block;
            forward.load_queries(block);
        } else if (forward.lane == 0) {
            shared.blocks[forward.warp].count = 0;
        }
        Rows<T, HEAD_DIM> rows;
        if (!WINDOWED) forward.load_whole_bias(first_block, end_block);
        for (int i = 0; i < key_tiles; ++i) {
            const int stage = i % STAGES;
            const Block tile = find_block(shared.sample, arguments.modalities, KEYS, i);
            cp_async_wait_all();
            __syncthreads();  // this tile is there, and nobody reads the one before, whose place the next one takes
            if (i + 1 < key_tiles) {
                forward.load_keys(1 - stage, find_block(shared.sample, arguments.modalities, KEYS, i + 1));
            }
            if (tile.modality == arguments.modalities) {
                attend_tile<BLOCK_ROWS>(rows, forward, tile, stage, active, bias_capacity);
            } else {
                attend_tile<KEYS>(rows, forward, tile, stage, active, bias_capacity);
            }
        }
        if (active) rows.store(forward, out, log_sum_exp);
        __syncthreads();  // the next queries take the place of these keys and results
    }
}

template <typename T, int HEAD_DIM>
const char* launch(const RelativeBiasAttention& arguments, void* out, float* log_sum_exp, void* stream) {
    // Each modality may have one unfilled block of rows, and CLS needs one more; a longer sample than is said is walked
    // by the same thread blocks in several rounds.
    const int64_t mean = arguments.samples ? arguments.rows / arguments.samples : 0;
    const int64_t length = arguments.max_length ? arguments.max_length : std::min<int64_t>(2 * mean, arguments.rows);
    const int64_t row_blocks = (length + (BLOCK_ROWS - 1) * arguments.modalities) / BLOCK_ROWS + 1;
    const int parts = static_cast<int>((row_blocks + Launch<HEAD_DIM>::WARPS - 1) / Launch<HEAD_DIM>::WARPS);
    int64_t entries = 0;
    for (int m = 0; m < arguments.bias_vectors; ++m) entries += arguments.bias[m].entries - CLS_ENTRIES;
    const int bias_capacity = static_cast<int>(std::min<int64_t>(entries, BIAS_CAPACITY));
    return launch_kernel(
        entries > BIAS_CAPACITY ? forward_kernel<T, HEAD_DIM, true> : forward_kernel<T, HEAD_DIM, false>,
        arguments.device, (arguments.samples + int64_t{1}) * arguments.heads * parts, Launch<HEAD_DIM>::THREADS,
        sizeof(Shared<T, HEAD_DIM>) + bias_capacity * sizeof(float), stream, arguments, static_cast<T*>(out),
        log_sum_exp, parts, bias_capacity);
}

template <typename T>
const char* launch_type(const RelativeBiasAttention& arguments, void* out, float* log_sum_exp, void* stream) {
    if (arguments.head_dim == 32) return launch<T, 32>(arguments, out, log_sum_exp, stream);
    if (arguments.head_dim == 64) return launch<T, 64>(arguments, out, log_sum_exp, stream);
    return launch<T, 128>(arguments, out, log_sum_exp, stream);
}

}  // namespace

const char* relative_bias_attention_forward(
    const RelativeBiasAttention& arguments, void* out, float* log_sum_exp, void* stream) {
    if (const char* problem = check_arguments(arguments)) return problem;
    if (!is_aligned(out, 16)) return "out: got an address off 16 bytes, takes a multiple of 16; allocate it anew";
    if (arguments.rows == 0) return nullptr;
    return arguments.type == FLOAT16 ? launch_type<float16>(arguments, out, log_sum_exp, stream)
                                     : launch_type<bfloat16>(arguments, out, log_sum_exp, stream);
}

}  // namespace onepeace_fast

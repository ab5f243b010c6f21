// Where the tokens of one sample lie, and how they are cut into row blocks: a row block never straddles two modalities,
// and CLS rows, which stand last in their segments, form row blocks of their own, all modalities together.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include "relative_bias_attention.h"

namespace onepeace_fast {

constexpr int WARP = 32;
constexpr int BLOCK_ROWS = 16;  // rows of a row block, as of a matrix instruction

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Up to BLOCK_ROWS consecutive body rows of a modality, or CLS rows, counted through all modalities, where modality ==
// modalities. The forward pass's tiles of keys are the same with up to KEYS body rows.
struct RowBlock {
    int modality;
    int first;
    int count;
};

// Of its queries or of its keys, in shared memory, for every thread of a thread block.
struct Sample {
    int first[MAX_MODALITIES];  // the first row of each segment
    int body[MAX_MODALITIES];   // its rows before CLS
    int cls[MAX_MODALITIES];    // its CLS rows
    int cls_total;
    int row_blocks;  // of BLOCK_ROWS rows
    int key_tiles;   // of KEY_ROWS rows, and of BLOCK_ROWS rows of CLS
};

struct Row {
    int index;
    int modality;
};

// A sample's queries by the first warp, its keys by the second; all threads see them after a barrier.
template <int KEY_ROWS>
__device__ __forceinline__ void read_sample(
    Sample& queries, Sample& keys, const RelativeBiasAttention& arguments, int index) {
    if (thread_index() >= 2 * WARP) return;
    const bool is_key = thread_index() >= WARP;
    const PackedRows& rows = is_key ? arguments.keys : arguments.queries;
    Sample& sample = is_key ? keys : queries;
    const int m = thread_index() % WARP;
    int cls = 0, row_blocks = 0, key_tiles = 0;
    if (m < arguments.modalities) {
        int first = 0, end = 0;
        if (m < rows.modalities) {
            const int32_t* offsets = rows.cu_seqlens + static_cast<int64_t>(m) * (arguments.samples + 1) + index;
            first = offsets[0];
            end = offsets[1];
        }
        // Both flags are loaded at once: more than one CLS is rare.
        const bool last = end > first && rows.is_cls[end - 1];
        const bool before = end > first + 1 && rows.is_cls[end - 2];
        cls = last ? 1 : 0;
        if (last && before) {
#pragma unroll 1
            for (cls = 2; end - cls > first && rows.is_cls[end - cls - 1];) ++cls;
        }
        const int body = end - first - cls;
        row_blocks = ceil_div(body, BLOCK_ROWS);
        key_tiles = ceil_div(body, KEY_ROWS);
        sample.first[m] = first;
        sample.body[m] = body;
        sample.cls[m] = cls;
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        cls += __shfl_xor_sync(0xffffffff, cls, step);
        row_blocks += __shfl_xor_sync(0xffffffff, row_blocks, step);
        key_tiles += __shfl_xor_sync(0xffffffff, key_tiles, step);
    }
    if (m == 0) {
        sample.cls_total = cls;
        sample.row_blocks = row_blocks + ceil_div(cls, BLOCK_ROWS);
        sample.key_tiles = key_tiles + ceil_div(cls, BLOCK_ROWS);
    }
}

// Row block `index` of a sample whose bodies are cut into pieces of up to `rows` rows.
__device__ __forceinline__ RowBlock find_row_block(const Sample& sample, int modalities, int rows, int index) {
    int m = 0;
#pragma unroll 1
    for (; m < modalities; ++m) {
        const int row_blocks = ceil_div(sample.body[m], rows);
        if (index < row_blocks) return {m, index * rows, min(rows, sample.body[m] - index * rows)};
        index -= row_blocks;
    }
    return {m, index * BLOCK_ROWS, min(BLOCK_ROWS, sample.cls_total - index * BLOCK_ROWS)};
}

// The one after a row block, of as many rows; behind the last one, one whose count is not positive.
__device__ __forceinline__ RowBlock next_row_block(
    const Sample& sample, int modalities, int rows, const RowBlock& row_block) {
    int m = row_block.modality, first = row_block.first + (m < modalities ? rows : BLOCK_ROWS);
#pragma unroll 1
    for (; m < modalities; ++m, first = 0) {
        if (first < sample.body[m]) return {m, first, min(rows, sample.body[m] - first)};
    }
    return {m, first, min(BLOCK_ROWS, sample.cls_total - first)};
}

// Row i of a row block; past its last row, its last row.
__device__ __forceinline__ Row find_row(const Sample& sample, int modalities, const RowBlock& row_block, int i) {
    i = row_block.first + min(i, row_block.count - 1);
    if (row_block.modality < modalities) return {sample.first[row_block.modality] + i, row_block.modality};
    int m = 0;
#pragma unroll 1
    for (; i >= sample.cls[m]; ++m) i -= sample.cls[m];
    return {sample.first[m] + sample.body[m] + i, m};
}

// The rows of a row block, by their numbers in it; past its last row, its last row.
class BlockRows {
  public:
    __device__ __forceinline__ BlockRows(const Sample& sample, int modalities, const RowBlock& row_block)
        : sample(sample), modalities(modalities), row_block(row_block),
          first(row_block.modality < modalities ? sample.first[row_block.modality] + row_block.first : -1) {}

    __device__ __forceinline__ int64_t operator[](int i) const {
        return first >= 0 ? first + min(i, row_block.count - 1) : find_row(sample, modalities, row_block, i).index;
    }

  private:
    const Sample& sample;
    const int modalities;
    const RowBlock& row_block;
    const int first;  // -1 where they are CLS
};

// The row that every modality's segments end before: what follows is inert.
__device__ __forceinline__ int find_end(const PackedRows& rows, int samples) {
    return rows.cu_seqlens[static_cast<int64_t>(rows.modalities) * (samples + 1) - 1];
}

// visit(row, lane) for rows from first to last, LANES threads to each, shared by the thread blocks along x.
template <int LANES, int THREADS, typename Visit>
__device__ __forceinline__ void share_rows(int64_t first, int64_t last, Visit visit) {
    constexpr int ROWS = THREADS / LANES;
    if (THREADS % LANES && thread_index() >= ROWS * LANES) return;
    int64_t row = first + blockIdx.x * ROWS + thread_index() / LANES;
    for (; row < last; row += gridDim.x * ROWS) visit(row, thread_index() % LANES);
}

}  // namespace onepeace_fast

// The last additions of the backward pass, each in a fixed order: what thread blocks left in the workspace.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include "backward_workspace.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

constexpr int SUM_THREADS = 256;

struct SampleOfBoth {
    Sample queries;
    Sample keys;
};

// data is dense, of a type.
__device__ __forceinline__ void store_element(void* data, ElementType type, int64_t index, float value) {
    if (type == FLOAT32) static_cast<float*>(data)[index] = value;
    if (type == FLOAT16) static_cast<float16*>(data)[index] = from_float<float16>(value);
    if (type == BFLOAT16) static_cast<bfloat16*>(data)[index] = from_float<bfloat16>(value);
}

// The gradients of vectors and of the head scale. Thread blocks: entries, heads; a thread for each entry, no shared
// memory, 32 registers on sm_80 and sm_90a by ptxas of nvcc 13.0, so 8 thread blocks for each multiprocessor. Bound by
// the latency of device memory: a thread reads groups x parts numbers, one after another.
static __global__ void __launch_bounds__(SUM_THREADS) attention_sum_entries_kernel(
    const __grid_constant__ RelativeBiasAttention arguments,
    const __grid_constant__ RelativeBiasAttentionGradients gradients,
    const __grid_constant__ BackwardWorkspace workspace) {
    const int head = blockIdx.y, index = blockIdx.x * SUM_THREADS + thread_index();
    if (index == 0 && workspace.scale_parts) {
        float sum = 0.f;
        for (int i = 0; i < workspace.groups; ++i) sum += workspace.scale_parts[i * arguments.heads + head];
        store_element(gradients.head_scale, arguments.head_scale_type, head, sum);
    }
    if (index >= workspace.entries || !workspace.entry_parts) return;
    int m = 0, entry = index;
#pragma unroll 1
    for (; entry >= arguments.bias[m].entries; ++m) entry -= arguments.bias[m].entries;
    if (!gradients.bias[m]) return;
    float sum = 0.f;
    for (int group = 0; group < workspace.groups; ++group) {
        for (int part = 0; part < workspace.parts; ++part) {
            sum += workspace.entry_parts[workspace.first_entry(group, part, head, arguments.heads) + index];
        }
    }
    const int64_t target = static_cast<int64_t>(head) * arguments.bias[m].entries + entry;
    store_element(gradients.bias[m], arguments.bias[m].type, target, sum);
}

// The gradients of queries whose samples were not walked whole. Thread blocks: some that share the rows of a sample,
// heads, samples; a thread for each chunk of a row, 408 bytes of shared memory, 39 registers on sm_80 and 40 on sm_90a
// by ptxas of nvcc 13.0, so 6 thread blocks for each multiprocessor. Bound by device memory, from which it reads the
// parts.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(SUM_THREADS) attention_sum_queries_kernel(
    const __grid_constant__ RelativeBiasAttention arguments,
    const __grid_constant__ RelativeBiasAttentionGradients gradients,
    const __grid_constant__ BackwardWorkspace workspace) {
    constexpr int ROW_CHUNKS = HEAD_DIM / CHUNK, ROWS = SUM_THREADS / ROW_CHUNKS;
    auto& [sample, key_sample] = *static_cast<SampleOfBoth*>(shared_memory());
    read_sample<BLOCK_ROWS>(sample, key_sample, arguments, blockIdx.z);
    __syncthreads();
    if (workspace.walks_whole(key_sample)) return;
    if (SUM_THREADS % ROW_CHUNKS && thread_index() >= ROWS * ROW_CHUNKS) return;
    const int chunk = thread_index() % ROW_CHUNKS;
#pragma unroll 1
    for (int i = blockIdx.x * ROWS + thread_index() / ROW_CHUNKS; i < sample.row_blocks * BLOCK_ROWS;
         i += gridDim.x * ROWS) {
        const RowBlock row_block = find_row_block(sample, arguments.modalities, BLOCK_ROWS, i / BLOCK_ROWS);
        if (i % BLOCK_ROWS >= row_block.count) continue;
        const int64_t row = find_row(sample, arguments.modalities, row_block, i % BLOCK_ROWS).index;
        float sums[CHUNK] = {};
        for (int part = 0; part < workspace.parts; ++part) {
            const int key_blocks = key_sample.row_blocks;
            if (workspace.first_key_block(part, key_blocks) == workspace.first_key_block(part + 1, key_blocks)) {
                continue;  // it had no keys
            }
            const int64_t rows = arguments.queries.rows, index = (part * rows + row) * arguments.heads + blockIdx.y;
            const auto* from =
                reinterpret_cast<const float4*>(workspace.query_parts + index * HEAD_DIM + chunk * CHUNK);
            for (int half = 0; half < 2; ++half) {
                const float4 four = from[half];
                sums[4 * half] += four.x;
                sums[4 * half + 1] += four.y;
                sums[4 * half + 2] += four.z;
                sums[4 * half + 3] += four.w;
            }
        }
        for (float& sum : sums) sum *= arguments.scale;
        T* target = static_cast<T*>(gradients.q.data) + row * gradients.q.row_stride + blockIdx.y * HEAD_DIM;
        *reinterpret_cast<uint4*>(target + chunk * CHUNK) = {
            pack<T>(sums[0], sums[1]), pack<T>(sums[2], sums[3]), pack<T>(sums[4], sums[5]),
            pack<T>(sums[6], sums[7])};
    }
}

}  // namespace onepeace_fast

// The rows of gradients in device memory.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>
#include <type_traits>

#include "relative_bias_attention.h"
#include "sample.cuh"
#include "tile.cuh"

namespace onepeace_fast {

// This head's row of a gradient: [SIZE].
template <typename T, int SIZE>
__device__ __forceinline__ T* gradient_row(const GradientRows& gradient, int64_t row) {
    return static_cast<T*>(gradient.data) + row * gradient.row_stride + blockIdx.y * SIZE;
}

// Set a gradient's rows of a sample; by all threads.
template <typename T, int SIZE, int THREADS>
__device__ void fill_rows(const GradientRows& gradient, const Sample& sample, int modalities, float value) {
#pragma unroll 1
    for (int m = 0; m < modalities; ++m) {
        const int elements = (sample.body[m] + sample.cls[m]) * SIZE;
        for (int i = thread_index(); i < elements; i += THREADS) {
            gradient_row<T, SIZE>(gradient, sample.first[m] + i / SIZE)[i % SIZE] = from_float<T>(value);
        }
    }
}

// Rows of the gradients past the last sample are zero; the thread blocks past the last group share them.
template <typename T, typename Launch>
__device__ void zero_inert_rows(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients) {
    const auto zero = [&](auto size, const GradientRows& gradient, const PackedRows& rows) {
        constexpr int SIZE = decltype(size)::value;
        const int first = find_end(rows, arguments.samples);
        share_rows<SIZE / CHUNK, Launch::THREADS>(first, rows.rows, [&](int64_t row, int chunk) {
            *reinterpret_cast<uint4*>(gradient_row<T, SIZE>(gradient, row) + chunk * CHUNK) = uint4{0, 0, 0, 0};
        });
    };
    constexpr std::integral_constant<int, Launch::HEAD_DIM> of_keys;
    zero(of_keys, gradients.q, arguments.queries);
    zero(of_keys, gradients.k, arguments.keys);
    zero(std::integral_constant<int, Launch::VALUE_DIM>(), gradients.v, arguments.keys);
}

}  // namespace onepeace_fast

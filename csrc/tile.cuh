// Matrices of 16-bit elements in shared memory, [rows, HEAD_DIM] with swizzled chunks, and the fragments that matrix
// instructions take.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include "sample.cuh"

namespace onepeace_fast {

constexpr int CHUNK = 8;  // elements of a 16-byte access

// This head's row of queries, keys or values: [HEAD_DIM].
template <typename T>
__device__ __forceinline__ const T* find_head_row(const HeadRows& rows, int row) {
    return static_cast<const T*>(rows.data) + row * rows.row_stride + blockIdx.y * rows.head_stride;
}

// Chunks, of as many as fill all banks or half of them, that swizzling exchanges. Where rows are an odd number of
// halves, 32 or 96 columns, every other row begins at the other half.
template <int HEAD_DIM>
constexpr int SWIZZLED_CHUNKS = HEAD_DIM % 64 ? 4 : 8;

// Offset of a chunk of 8 columns: eight rows that are read at once lie in eight different groups of banks.
template <int HEAD_DIM>
__device__ __forceinline__ constexpr int swizzled(int row, int chunk) {
    static_assert(HEAD_DIM % 32 == 0);
    const int turned = HEAD_DIM % 64 ? chunk ^ (row / 2 % 4) : chunk ^ (row % 8);
    return row * HEAD_DIM + turned * CHUNK;
}

// The offset of a chunk an even number of chunks to the right of chunk 0 or 1, whose offset is given: swizzling flips
// bits alone, and so does this as far as it goes.
template <int HEAD_DIM>
__device__ __forceinline__ constexpr int chunk_offset(int offset, int chunks) {
    constexpr int TURNED = SWIZZLED_CHUNKS<HEAD_DIM>;
    return (offset ^ chunks % TURNED * CHUNK) + chunks / TURNED * TURNED * CHUNK;
}

// Rows 16 i and columns 16 k on of a row-major matrix, as the left operand.
template <int HEAD_DIM, typename T>
__device__ __forceinline__ void left_operand(uint32_t (&a)[4], const T* matrix, int lane, int i, int k) {
    ldmatrix(a, matrix + chunk_offset<HEAD_DIM>(swizzled<HEAD_DIM>(lane % 16, lane / 16), 2 * k) + 16 * i * HEAD_DIM);
}

// For the right operand of left times matrix^T: columns 16 k on of rows 16 j on, rows j to j + 7 in b[0], b[1].
template <int HEAD_DIM, typename T>
__device__ __forceinline__ void transposed_right_operand(uint32_t (&b)[4], const T* matrix, int lane, int j, int k) {
    const int offset = swizzled<HEAD_DIM>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    ldmatrix(b, matrix + chunk_offset<HEAD_DIM>(offset, 2 * k) + 16 * j * HEAD_DIM);
}

// For the right operand of left times matrix: rows 16 k on of columns 16 j on, columns j to j + 7 in b[0], b[1].
template <int HEAD_DIM, typename T>
__device__ __forceinline__ void right_operand(uint32_t (&b)[4], const T* matrix, int lane, int k, int j) {
    const int offset = swizzled<HEAD_DIM>(lane % 16, lane / 16);
    ldmatrix_transposed(b, matrix + chunk_offset<HEAD_DIM>(offset, 2 * j) + 16 * k * HEAD_DIM);
}

// Two accumulators side by side, 16 rows and 16 columns, as the left operand.
template <typename T>
__device__ __forceinline__ void left_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack<T>(left[0], left[1]);
    a[1] = pack<T>(left[2], left[3]);
    a[2] = pack<T>(right[0], right[1]);
    a[3] = pack<T>(right[2], right[3]);
}

// Sum and maximum over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float row_sum(float value) {
    value += __shfl_xor_sync(0xffffffff, value, 1);
    return value + __shfl_xor_sync(0xffffffff, value, 2);
}

__device__ __forceinline__ float row_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, 1));
    return fmaxf(value, __shfl_xor_sync(0xffffffff, value, 2));
}

}  // namespace onepeace_fast

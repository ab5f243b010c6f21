// Pairs of row blocks whose codes are runs, one more from each row to the next: what tokens of a pair share with other
// pairs is row - column alone, along each diagonal of the 16 x 16, and the difference of the two first codes.
//
// Of two accumulators side by side, [16, 8] each, a thread holds 8 values [n][i] in row g + 8 (i / 2) and column
// 8 n + 2 t + i % 2, where g = lane / 4 and t = lane % 4. They lie on 6 diagonals, which this numbers:
//
//     row - column = g - 2 t + 8 (i / 2 - n) - i % 2
//
//               n = 0            n = 1                 number              row - column - (g - 2 t)
//     i = 0..1  2 3              0 1                   0  1  2  3  4  5    -8  -9  0  -1  8  7
//     i = 2..3  4 5              2 3

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include "sample.cuh"

namespace onepeace_fast {

constexpr int DIAGONALS = 6;  // that a thread's 8 values lie on

// The diagonal of value [n][i].
__host__ __device__ constexpr int diagonal(int n, int i) { return 2 * (1 + i / 2 - n) + i % 2; }

// row - column of a diagonal, beyond that of the lane.
__host__ __device__ constexpr int diagonal_distance(int diagonal) { return 8 * (diagonal / 2 - 1) - diagonal % 2; }

// row - column of a lane's first value.
__device__ __forceinline__ int lane_distance(int lane) { return lane / 4 - lane % 4 * 2; }

// Whether the codes of ROWS rows, in shared memory, are one run in each row block, as far as there are rows: the first
// code of each then says all. By all lanes of a warp, which get the same answer.
template <int ROWS>
__device__ __forceinline__ bool are_runs(const int* code, int count) {
    bool broken = false;
#pragma unroll
    for (int first = 0; first < ROWS; first += WARP) {
        const int row = first + thread_index() % WARP % ROWS;
        broken |= row < count && code[row] != code[row / BLOCK_ROWS * BLOCK_ROWS] + row % BLOCK_ROWS;
    }
    return __ballot_sync(0xffffffff, broken) == 0;
}

}  // namespace onepeace_fast

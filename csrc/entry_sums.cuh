// A thread block's sums of entries: the fixed point of a sample's, what they add up to over samples, and what block
// differences add to them.

#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cmath>

#include "backward_memory.cuh"
#include "bias_gradient.cuh"
#include "difference_sums.cuh"
#include "relative_bias_attention.h"
#include "sample.cuh"

namespace onepeace_fast {

__device__ __forceinline__ int64_t join(int high, int low, int bits) {
    return (static_cast<int64_t>(high) << bits) + low;
}

// Add the sums by block difference to the entries; by all threads, behind a barrier.
template <typename T, typename Launch, bool LARGE>
__device__ void add_all_differences(const Backward<T, Launch, LARGE>& backward) {
    constexpr int THREADS = Launch::THREADS;
    auto& shared = backward.shared;
    if (!backward.is_learned()) return;
#pragma unroll 1
    for (int m = 0; m < backward.arguments.bias_vectors; ++m) {
        if (shared.differences.count[m] == 0) continue;
        const int start = shared.bias_start[m], body = backward.arguments.bias[m].entries - CLS_ENTRIES;
        float* entries = backward.workspace.entry_parts + backward.first_entry() + start;
        // A thread has the entries that flush gives it.
        for (int i = (thread_index() + ceil_div(start, THREADS) * THREADS - start) % THREADS; i < body; i += THREADS) {
            const int distance = i - backward.arguments.bias[m].code_offset;
            entries[i] += add_differences(shared.differences, backward.difference_sums(), m, distance);
        }
    }
}

// Add the sums of a sample that is done to those of this thread block, and begin anew.
template <typename T, typename Launch, bool LARGE>
__device__ void flush(const Backward<T, Launch, LARGE>& backward) {
    constexpr int THREADS = Launch::THREADS;
    auto& shared = backward.shared;
    if (!backward.is_learned()) return;
    __syncthreads();  // every warp has added
    const int bits = low_bits(backward.rows());
    const float factor = shared.is_finite ? power_of_two(-shared.exponent - bits) : NAN;
    for (int i = thread_index(); i < backward.workspace.entries; i += THREADS) {
        int &high = backward.sums()[i], &low = backward.sums()[backward.workspace.entries + i];
        const float sum = static_cast<float>(join(high, low, bits)) * factor;
        backward.workspace.entry_parts[backward.first_entry() + i] += sum;
        high = low = 0;
    }
    __syncthreads();  // nobody reads the exponent any more
    if (thread_index() == 0) shared.exponent = MOST_EXPONENT;
}

// The sums of entries, ready for scores' gradients up to the largest, or up to a lane's row sum, which other walks
// may have made larger; where sums were finer, they are rounded. By all threads, behind a barrier.
template <typename T, typename Launch, bool LARGE>
__device__ __forceinline__ Sums prepare_sums(const Backward<T, Launch, LARGE>& backward, float row_sum) {
    constexpr int THREADS = Launch::THREADS;
    auto& shared = backward.shared;
    uint32_t largest = magnitude(row_sum);
    for (int step = WARP / 2; step > 0; step /= 2) {
        largest = max(largest, __shfl_xor_sync(0xffffffff, largest, step));
    }
    for (int warp = 0; warp < Launch::WARPS; ++warp) largest = max(largest, shared.largest[warp]);
    const int before = shared.exponent, bits = low_bits(backward.rows());
    const uint32_t bound = bound_sums(largest, backward.head_scale(), backward.rows());
    const int exponent = bound < INFINITE_BITS ? min(before, fixed_point(bound)) : before;
    if (bound >= INFINITE_BITS && thread_index() == 0) shared.is_finite = false;
    if (exponent < before) {
        const int shift = min(before - exponent, 62);
        for (int i = thread_index(); i < backward.workspace.entries; i += THREADS) {
            int &high = backward.sums()[i], &low = backward.sums()[backward.workspace.entries + i];
            const int64_t sum = (join(high, low, bits) + (int64_t{1} << (shift - 1))) >> shift;
            high = static_cast<int>(sum >> bits);
            low = static_cast<int>(sum - (static_cast<int64_t>(high) << bits));
        }
        __syncthreads();  // everybody knows the exponent before, and has rounded
        if (thread_index() == 0) shared.exponent = exponent;
    }
    return {backward.sums(), backward.workspace.entries, power_of_two(exponent), power_of_two(bits)};
}

}  // namespace onepeace_fast

// The functions of ../ptx.cuh on a CPU: what a lane gives or reads is its own access, the arithmetic is done once for
// the warp, and copies come as late as they may.

#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "warp.h"

namespace onepeace_fast {

template <typename T>
uint32_t pack(float first, float second) {
    const T both[2] = {from_float<T>(first), from_float<T>(second)};
    uint32_t result;
    std::memcpy(&result, both, 4);
    return result;
}

// Results below the normal numbers are flushed to zero; inputs below them give 1 either way.
inline float fast_exp2(float x) {
    const float result = std::exp2(x);
    return result < std::numeric_limits<float>::min() ? 0.f : result;
}

inline int thread_index() { return host_shim::position().thread.x; }

__forceinline__ int warp_index() { return __shfl_sync(0xffffffff, thread_index() / 32, 0); }

inline void* shared_memory() { return host_shim::shared_memory(); }

inline void cp_async_16(void* shared, const void* global) { host_shim::copy_later(shared, global, 16); }
inline void cp_async_4(void* shared, const void* global) { host_shim::copy_later(shared, global, 4); }
inline void cp_async_wait_all() { host_shim::wait_for_copies(); }

__forceinline__ void load_matrices(
    const char* kind, uint32_t (&matrices)[4], const void* row, void (*finish)(host_shim::Lanes)) {
    if (reinterpret_cast<uintptr_t>(row) % 16) host_shim::fail("ldmatrix reads an address off 16 bytes");
    host_shim::MatrixRow lane;
    std::memcpy(lane.given, row, 16);
    host_shim::with_warp(kind, &lane, finish);
    std::memcpy(matrices, lane.received, 16);
}

__forceinline__ void ldmatrix(uint32_t (&matrices)[4], const void* row) {
    load_matrices("ldmatrix", matrices, row, host_shim::load_matrices);
}

__forceinline__ void ldmatrix_transposed(uint32_t (&matrices)[4], const void* row) {
    load_matrices("ldmatrix.trans", matrices, row, host_shim::load_matrices_transposed);
}

template <typename T>
__forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host_shim::Fragments lane{c, a, {b0, b1}};
    host_shim::with_warp("mma", &lane, host_shim::multiply<T>);
}

}  // namespace onepeace_fast

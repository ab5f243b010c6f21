// The names of CUDA that the kernels' sources use, on a CPU.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#include "fibers.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (host_shim::position().thread)
#define blockIdx (host_shim::position().block)
#define blockDim (host_shim::position().block_size)
#define gridDim (host_shim::position().grid_size)

using std::max;
using std::min;

struct uint4 {
    unsigned x, y, z, w;
};

struct dim3 : host_shim::Index {
    explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : Index{x, y, z} {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

constexpr int SHARED_BYTES_OF_A_BLOCK = 227 * 1024;

#define CUDART_VERSION 13000
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int value) {
    return value > SHARED_BYTES_OF_A_BLOCK ? cudaErrorInvalidValue : cudaSuccess;
}

template <typename... Parameters, size_t... I>
void call_kernel(void (*kernel)(Parameters...), void** values, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<Parameters>*>(values[I])...);
}

template <typename... Parameters>
cudaError_t cudaLaunchKernel(
    void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void** values, size_t shared_bytes, cudaStream_t) {
    host_shim::run_grid(blocks, threads.x, shared_bytes, [&] {
        call_kernel(kernel, values, std::index_sequence_for<Parameters...>());
    });
    return cudaSuccess;
}

inline void __syncthreads() { host_shim::synchronize_block(); }
inline void __syncwarp() { host_shim::synchronize_warp(); }

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
    static_assert(sizeof(Value) == 4);
    host_shim::Word lane{0, 0, mask};
    std::memcpy(&lane.given, &value, 4);
    host_shim::with_warp("__shfl_xor_sync", &lane, host_shim::shuffle_xor);
    std::memcpy(&value, &lane.received, 4);
    return value;
}

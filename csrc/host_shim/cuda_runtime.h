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
#define gridDim (host_shim::position().grid_size)

using std::max;
using std::min;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

struct dim3 : host_shim::Index {
    explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : Index{x, y, z} {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

#define CUDART_VERSION 13000
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    host_shim_device = device;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = host_shim::shared_limit();
    return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
    return host_shim::allow_shared_memory(reinterpret_cast<void*>(kernel), value) ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename... Parameters, size_t... I>
void call_kernel(void (*kernel)(Parameters...), void** values, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<Parameters>*>(values[I])...);
}

template <typename... Parameters>
cudaError_t cudaLaunchKernel(
    void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void** values, size_t shared_bytes, cudaStream_t) {
    const bool fits = blocks.x - 1 < 0x7fffffff && blocks.y - 1 < 0xffff && blocks.z - 1 < 0xffff;
    if (!fits || !host_shim::may_launch(reinterpret_cast<void*>(kernel), shared_bytes)) return cudaErrorInvalidValue;
    host_shim::run_grid(blocks, threads.x, shared_bytes, [&] {
        call_kernel(kernel, values, std::index_sequence_for<Parameters...>());
    });
    return cudaSuccess;
}

// Inlined, so that the place of each collective instruction is the caller's.
__forceinline__ void __syncthreads() { host_shim::synchronize_block(); }
__forceinline__ void __syncwarp() { host_shim::synchronize_warp(); }

// The value of the lane whose number is given.
template <typename Value>
__forceinline__ Value __shfl_sync(unsigned, Value value, int source) {
    static_assert(sizeof(Value) == 4);
    host_shim::Word lane{0, 0, source % host_shim::WARP};
    std::memcpy(&lane.given, &value, 4);
    host_shim::with_warp("__shfl_sync", &lane, host_shim::shuffle);
    std::memcpy(&value, &lane.received, 4);
    return value;
}

template <typename Value>
__forceinline__ Value __shfl_xor_sync(unsigned mask, Value value, int flipped) {
    return __shfl_sync(mask, value, threadIdx.x % host_shim::WARP ^ flipped);
}

__forceinline__ unsigned __ballot_sync(unsigned, bool value) {
    host_shim::Word lane{value, 0, 0};
    host_shim::with_warp("__ballot_sync", &lane, host_shim::vote);
    return lane.received;
}

inline int atomicAdd(int* target, int value) { return __atomic_fetch_add(target, value, __ATOMIC_RELAXED); }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }

// To the nearest, ties to even; what no integer holds becomes the largest or smallest, and NaN zero.
inline int __float2int_rn(float value) {
    if (value != value) return 0;
    if (value >= 2147483648.f) return 2147483647;
    if (value < -2147483648.f) return -2147483647 - 1;
    return static_cast<int>(std::nearbyintf(value));
}

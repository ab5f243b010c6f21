// What every entry does before and for a launch.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "relative_bias_attention.h"

namespace onepeace_fast {

constexpr int MAX_GRID = 65535;  // thread blocks along the grid's second and third dimension

inline bool is_aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// What is wrong with the arguments, in one line, or null.
inline const char* check_arguments(const RelativeBiasAttention& arguments) {
    const RelativeBiasAttention& a = arguments;
    if (a.head_dim != 32 && a.head_dim != 64 && a.head_dim != 128) {
        return "qkv: got a head size that the CUDA kernel does not have, takes 32, 64 or 128";
    }
    if (a.type != FLOAT16 && a.type != BFLOAT16) {
        return "qkv: got a dtype that the CUDA kernel does not have, takes float16 or bfloat16";
    }
    if (a.modalities < 1 || a.modalities > MAX_MODALITIES) {
        return "cu_seqlens: got a number of modalities that the CUDA kernel does not have, takes 1 to 16";
    }
    if (a.samples < 0 || a.rows < 0 || a.heads < 1 || a.max_length < 0) {
        return "qkv: got a negative size or no head, takes at least one head";
    }
    if (a.heads > MAX_GRID || a.samples >= MAX_GRID) {
        return "cu_seqlens: got more samples or heads than one launch takes, takes up to 65534; pass fewer at once";
    }
    if (a.bias_vectors != 0 && a.bias_vectors != a.modalities) {
        return "bias: got another number of vectors than modalities, takes one each, or none";
    }
    for (int m = 0; m < a.bias_vectors; ++m) {
        if (a.bias[m].entries <= CLS_ENTRIES || a.bias[m].type < FLOAT16 || a.bias[m].type > FLOAT32) {
            return "bias: got a vector of too few entries or another dtype, takes float16, bfloat16 or float32 "
                   "[heads, 4 or more]";
        }
    }
    if (a.head_scale && (a.head_scale_type < FLOAT16 || a.head_scale_type > FLOAT32)) {
        return "head_scale: got another dtype, takes float16, bfloat16 or float32";
    }
    if (!is_aligned(a.qkv, 16) || a.row_stride % 8 || a.which_stride % 8 || a.head_stride % 8) {
        return "qkv: got an address or strides off 16 bytes, takes multiples of 16 bytes; pass a contiguous copy";
    }
    return nullptr;
}

// Bytes of shared memory that a thread block may have on a device.
inline int shared_limit(int device) {
    int bytes = 0;
    if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
        cudaGetLastError();  // the next call must not meet this error again
        return 0;
    }
    return bytes;
}

// Launch on the arguments' device, which stays the current one: the caller has a guard, and to set back what was the
// current device would create a context there. Returns null, or CUDA's error.
template <typename... Parameters, typename... Values>
const char* launch_kernel(
    void (*kernel)(Parameters...), int device, dim3 grid, int threads, size_t shared_bytes, void* stream,
    const Values&... values) {
    cudaError_t status = cudaSetDevice(device);
    if (status == cudaSuccess) {
        status = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (status == cudaSuccess) {
        void* addresses[] = {const_cast<void*>(static_cast<const void*>(&values))...};
        status = cudaLaunchKernel(
            kernel, grid, dim3(threads), addresses, shared_bytes,
            static_cast<cudaStream_t>(stream));
    }
    if (status == cudaSuccess) return nullptr;
    cudaGetLastError();  // the next call must not meet this error again
    return cudaGetErrorString(status);
}

}  // namespace onepeace_fast

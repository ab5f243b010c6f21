// What every entry does before and for a launch.

#pragma once

#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <type_traits>

#include "relative_bias_attention.h"

namespace onepeace_fast {

constexpr int MAX_GRID = 65535;  // thread blocks along a grid's second and third dimension

// One line for the caller, formatted as by printf, which stays until this thread's next one.
__attribute__((format(printf, 1, 2))) inline const char* say(const char* format, ...) {
    static thread_local char line[240];
    va_list values;
    va_start(values, format);
    std::vsnprintf(line, sizeof(line), format, values);
    va_end(values);
    return line;
}

// Why an address does not begin a 16-byte access, or null.
inline const char* check_address(const char* name, const void* address) {
    const int off = static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16);
    if (!off) return nullptr;
    return say("%s: expected an address that 16 divides, got one that is %d modulo 16; pass a copy", name, off);
}

// Why rows of a tensor cannot be read 16 bytes at a time, or null.
inline const char* check_rows(const char* name, const void* address, std::initializer_list<int64_t> strides) {
    for (const int64_t stride : strides) {
        if (stride % 8) {
            const auto got = static_cast<long long>(stride);
            return say("%s: expected strides that 8 divides, got %lld; pass a contiguous copy", name, got);
        }
    }
    return check_address(name, address);
}

inline const char* name_of(ElementType type) {
    if (type == FLOAT32) return "float32";
    return type == FLOAT16 ? "float16" : type == BFLOAT16 ? "bfloat16" : "an unknown type";
}

// call(constants that are the head sizes of keys and of values), for those that check_arguments takes.
template <typename Call>
auto with_head_sizes(int32_t head_dim, int32_t value_dim, Call call) {
    constexpr std::integral_constant<int, 32> of_32;
    constexpr std::integral_constant<int, 64> of_64;
    constexpr std::integral_constant<int, 96> of_96;
    constexpr std::integral_constant<int, 128> of_128;
    if (head_dim == 32) return call(of_32, of_32);
    if (head_dim == 64) return call(of_64, of_64);
    if (head_dim == 96) return call(of_96, of_96);
    return value_dim == 64 ? call(of_128, of_64) : call(of_128, of_128);
}

// What is wrong with the arguments, in one line, or null.
inline const char* check_arguments(const RelativeBiasAttention& a) {
    if (a.head_dim % 32 || a.head_dim < 32 || a.head_dim > 128) {
        return say("qkv: expected a head size of 32, 64, 96 or 128, got %d", a.head_dim);
    }
    if (a.value_dim != a.head_dim && (a.head_dim != 128 || a.value_dim != 64)) {
        return say("v: expected values of the keys' %d, or of 64 beside 128, got %d", a.head_dim, a.value_dim);
    }
    if (a.type != FLOAT16 && a.type != BFLOAT16) {
        return say("qkv: expected float16 or bfloat16, got %s", name_of(a.type));
    }
    for (const PackedRows* rows : {&a.queries, &a.keys}) {
        if (rows->modalities < 1 || rows->modalities > a.modalities || a.modalities > MAX_MODALITIES) {
            return say("cu_seqlens: expected 1 to %d modalities, got %d", MAX_MODALITIES, rows->modalities);
        }
        if (a.samples < 0 || rows->rows < 0 || a.heads < 1 || rows->max_length < 0) {
            return say(
                "qkv: expected no negative size and at least one head, got %d samples, %d rows, %d heads and a longest "
                "sample of %d",
                a.samples, rows->rows, a.heads, rows->max_length);
        }
    }
    if (!a.queries.order != !a.keys.order) {
        return "order: expected that of queries and of keys, or none, got one of them";
    }
    if (a.heads > MAX_GRID || a.samples >= MAX_GRID) {
        return say(
            "cu_seqlens: expected at most %d samples and %d heads in one launch, got %d and %d; pass fewer at once",
            MAX_GRID - 1, MAX_GRID, a.samples, a.heads);
    }
    if (a.bias_vectors > 1 && a.bias_vectors != a.modalities) {
        return say(
            "bias: expected one vector for each of %d modalities, one for all, or none, got %d", a.modalities,
            a.bias_vectors);
    }
    for (int m = 0; m < a.bias_vectors; ++m) {
        const BiasVector& vector = a.bias[m];
        if (vector.entries <= CLS_ENTRIES || vector.type < FLOAT16 || vector.type > FLOAT32) {
            return say(
                "bias: expected float16, bfloat16 or float32 [heads, %d or more], got %s [heads, %d] for modality %d",
                CLS_ENTRIES + 1, name_of(vector.type), vector.entries, m);
        }
    }
    if (a.head_scale && (a.head_scale_type < FLOAT16 || a.head_scale_type > FLOAT32)) {
        return say("head_scale: expected float16, bfloat16 or float32, got %s", name_of(a.head_scale_type));
    }
    const char* problem = check_rows("q", a.q.data, {a.q.row_stride, a.q.head_stride});
    if (!problem) problem = check_rows("k", a.k.data, {a.k.row_stride, a.k.head_stride});
    return problem ? problem : check_rows("v", a.v.data, {a.v.row_stride, a.v.head_stride});
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

// Launch on a device, which stays the current one: the caller has a guard, and to set back what was the current device
// would create a context there. The kernel is allowed its shared memory anew each time, since that holds for one device
// alone. Between that and the launch no other thread may come: Python's lock, which the binding keeps, sees to it.
// Returns null, or one line.
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
            kernel, grid, dim3(threads), addresses, shared_bytes, static_cast<cudaStream_t>(stream));
    }
    if (status == cudaSuccess) return nullptr;
    cudaGetLastError();  // the next call must not meet this error again
    return say("relative_bias_attention: CUDA refuses the launch: %s", cudaGetErrorString(status));
}

}  // namespace onepeace_fast

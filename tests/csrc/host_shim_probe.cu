// Kernels with one fault each, which csrc/host_shim shall find: PROBE FAULT, none for 0.

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdio>
#include <cstdlib>

namespace onepeace_fast {
namespace {

__device__ __forceinline__ int exchange(int value) { return __shfl_xor_sync(0xffffffff, value, 16); }

__global__ void probe(int fault, int* sums) {
    const int lane = thread_index();
    char* memory = static_cast<char*>(shared_memory());
    const bool upper = lane % 32 >= 16;
    *reinterpret_cast<uint4*>(memory + 16 * lane) = uint4{1, 2, 3, 4};
    __syncthreads();
    sums[lane] = exchange(lane);
    if (fault == 1) *reinterpret_cast<uint4*>(memory + 16 * lane + 8) = uint4{1, 2, 3, 4};
    if (fault == 2) sums[lane] += static_cast<int>(reinterpret_cast<const float2*>(memory + 8 * lane + 4)->x);
    if (fault == 3) sums[lane] = upper ? __shfl_xor_sync(0xffffffff, lane, 1) : __shfl_xor_sync(0xffffffff, lane, 2);
    if (fault == 4) {
        if (upper) {
            sums[lane] = exchange(lane + 1);
        } else {
            sums[lane] = exchange(lane + 2);
        }
    }
    if (fault == 5) {
        if (upper) {
            __syncthreads();
        } else {
            __syncthreads();
        }
    }
    if (fault == 6) {
        float c[4] = {};
        uint32_t a[4] = {};
        if (upper) {
            mma<bfloat16>(c, a, 0, 0);
        } else {
            mma<bfloat16>(c, a, 0, 0);
        }
    }
    if (fault == 7) {
        if (lane < 32) {
            __syncthreads();
        } else {
            __syncthreads();
        }
    }
}

}  // namespace
}  // namespace onepeace_fast

int main(int, char** arguments) {
    const int fault = std::atoi(arguments[1]), threads = 64;
    if (fault == 8) {
        std::printf(
            "%g %g %g %g\n", onepeace_fast::fast_exp2(-126.f), onepeace_fast::fast_exp2(-126.5f),
            onepeace_fast::fast_exp2(-INFINITY), onepeace_fast::fast_exp2(1e-40f));
        return 0;
    }
    int sums[threads];
    int* address = sums;
    void* values[] = {const_cast<int*>(&fault), &address};
    const size_t bytes = fault == 9 ? 64 * 1024 : 16 * threads + 16;
    return cudaLaunchKernel(onepeace_fast::probe, dim3(1), dim3(threads), values, bytes, nullptr);
}

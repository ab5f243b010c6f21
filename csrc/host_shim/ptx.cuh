// The functions of ../ptx.cuh on a CPU: what a lane gives or reads is its own access, the arithmetic is done once for the
// warp, and copies come as late as they may.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace onepeace_fast {

struct float16 {
    _Float16 value;
};

struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(float16 value) { return static_cast<float>(value.value); }
inline float to_float(bfloat16 value) {
    const uint32_t bits = uint32_t{value.bits} << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

template <typename T>
T round_to(float value);

template <>
inline float16 round_to<float16>(float value) {
    return {static_cast<_Float16>(value)};
}

// To the nearest, ties to even.
template <>
inline bfloat16 round_to<bfloat16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <typename T>
uint32_t pack(float first, float second) {
    const T both[2] = {round_to<T>(first), round_to<T>(second)};
    uint32_t result;
    std::memcpy(&result, both, 4);
    return result;
}

inline float fast_exp2(float x) { return std::exp2(x); }

inline void* shared_memory() { return host_shim::shared_memory(); }

inline void cp_async_16(void* shared, const void* global, bool valid) {
    host_shim::copy_later(shared, valid ? global : nullptr, 16);
}
inline void cp_async_4(void* shared, const void* global) { host_shim::copy_later(shared, global, 4); }
inline void cp_async_wait_all() { host_shim::wait_for_copies(); }

struct MatrixRow {
    uint16_t given[8];
    uint32_t received[4];
};

template <bool TRANSPOSED>
void exchange_matrices(void* const (&arguments)[host_shim::WARP]) {
    for (int lane = 0; lane < host_shim::WARP; ++lane) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            const auto element = [&](int row, int column) {
                return uint32_t{static_cast<MatrixRow*>(arguments[8 * matrix + row])->given[column]};
            };
            const int outer = lane / 4, inner = 2 * (lane % 4);
            static_cast<MatrixRow*>(arguments[lane])->received[matrix] =
                TRANSPOSED ? element(inner, outer) | element(inner + 1, outer) << 16
                           : element(outer, inner) | element(outer, inner + 1) << 16;
        }
    }
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&matrices)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) host_shim::fail("ldmatrix reads an address off 16 bytes");
    MatrixRow exchange;
    std::memcpy(exchange.given, row, 16);
    host_shim::with_warp(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", &exchange, exchange_matrices<TRANSPOSED>);
    std::memcpy(matrices, exchange.received, 16);
}

inline void ldmatrix(uint32_t (&matrices)[4], const void* row) { load_matrices<false>(matrices, row); }
inline void ldmatrix_transposed(uint32_t (&matrices)[4], const void* row) { load_matrices<true>(matrices, row); }

struct Fragments {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};

template <typename T>
void unpack(uint32_t packed, float& first, float& second) {
    T both[2];
    std::memcpy(both, &packed, 4);
    first = to_float(both[0]);
    second = to_float(both[1]);
}

template <typename T>
void multiply_fragments(void* const (&arguments)[host_shim::WARP]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < host_shim::WARP; ++lane) {
        const Fragments& mine = *static_cast<Fragments*>(arguments[lane]);
        const int g = lane / 4, t = 2 * (lane % 4);
        for (int i = 0; i < 4; ++i) {
            float* target = &a[g + i % 2 * 8][t + i / 2 * 8];
            unpack<T>(mine.a[i], target[0], target[1]);
        }
        for (int i = 0; i < 2; ++i) unpack<T>(mine.b[i], b[t + 8 * i][g], b[t + 8 * i + 1][g]);
    }
    float c[16][8] = {};
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int lane = 0; lane < host_shim::WARP; ++lane) {
        float* mine = static_cast<Fragments*>(arguments[lane])->c;
        for (int i = 0; i < 4; ++i) mine[i] += c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
    }
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Fragments fragments{c, a, {b0, b1}};
    host_shim::with_warp("mma", &fragments, multiply_fragments<T>);
}

}  // namespace onepeace_fast

// The 16-bit element types on a CPU.

#pragma once

#include <cstdint>
#include <cstring>

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
T from_float(float value);

template <>
inline float16 from_float<float16>(float value) {
    return {static_cast<_Float16>(value)};
}

// To the nearest, ties to even.
template <>
inline bfloat16 from_float<bfloat16>(float value) {
    if (value != value) return {0x7fff};
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace onepeace_fast

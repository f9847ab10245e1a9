// 16-bit real numbers, one at a time and in plain C++; the instruction sets have their own for whole vectors.

#pragma once

#include <bit>
#include <cstdint>

#include "layout.hpp"

namespace upq::cpu {
namespace {  // compiled for several instruction sets: each object keeps its own copy

inline float widen_bf16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

inline std::uint16_t narrow_bf16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);  // a quiet NaN
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);  // to nearest, ties to even
}

inline float widen_f16(std::uint16_t bits) {
    const std::uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // Moved 13 bits up, the exponent's bias is 15 instead of 127; the product is exact, subnormals included.
    const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
}

inline std::uint16_t narrow_f16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    const std::uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return sign | 0x7e00u;
    if (rest >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
    if (rest < 0x38800000u) {                        // below 2^-14: adding ½ leaves units of 2^-24 in the last bits
        const float shifted = std::bit_cast<float>(rest) + 0.5f;
        return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
    }
    const std::uint32_t rounded = rest + 0xfffu + (rest >> 13 & 1u);  // to nearest, ties to even
    return static_cast<std::uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

// Element i of an array of `real`.
inline float widen(const void* data, Real real, std::int64_t i) {
    if (real == Real::f32) return static_cast<const float*>(data)[i];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[i];
    return real == Real::f16 ? widen_f16(bits) : widen_bf16(bits);
}

}  // namespace
}  // namespace upq::cpu

// Tokens as the products take them: widened to float32, and for w2a8 quantised to int8, one scale a token.

#pragma once

#include <bit>
#include <cstring>
#include <limits>

#include "layout.hpp"
#include "reals.hpp"

namespace upq::cpu {
namespace {

// Token `token` in float32: where it lies, or in `scratch` if it is stored in 16 bits.
template <class Isa>
const float* widened(const Rows& x, std::int64_t token, float* scratch) {
    if (x.real == Real::f32) return static_cast<const float*>(x.data) + token * x.columns;
    const auto* halves = static_cast<const std::uint16_t*>(x.data) + token * x.columns;
    std::int64_t i = 0;
    if (x.real == Real::f16)
        for (; i + Isa::lanes <= x.columns; i += Isa::lanes) Isa::store(scratch + i, Isa::load_f16(halves + i));
    else
        for (; i + Isa::lanes <= x.columns; i += Isa::lanes) Isa::store(scratch + i, Isa::load_bf16(halves + i));
    for (; i < x.columns; ++i) scratch[i] = x.real == Real::f16 ? widen_f16(halves[i]) : widen_bf16(halves[i]);
    return scratch;
}

// max|x| as the bits of a float: the order of the bits is that of the values, and NaN comes after infinity.
inline std::uint32_t peak_bits(const float* row, std::int64_t columns) {
    std::uint32_t peak = 0;
    for (std::int64_t i = 0; i < columns; ++i) {
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(row[i]) & 0x7fffffffu;
        peak = bits > peak ? bits : peak;
    }
    return peak;
}

// round(row · inverse), ties to even, for values of at most 127; their sum.
inline std::int32_t round_int8(const float* row, std::int64_t count, float inverse, std::int8_t* out) {
    // From 2^23 on a float has no places left for fractions: adding 1.5 · 2^23 rounds as the processor is set (to
    // nearest, ties to even), and the integer stands in the low bits. Compilers make vectors of this on any machine.
    constexpr float shift = 12582912.0f;
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const auto bits = std::bit_cast<std::int32_t>(row[i] * inverse + shift);
        const std::int32_t value = bits - std::bit_cast<std::int32_t>(shift);
        out[i] = static_cast<std::int8_t>(value);
        sum += value;
    }
    return sum;
}

template <class Isa>
void quantize(const Rows& x, const Segments& segments, std::int64_t token, float* scratch, const IntTokens& out) {
    const float* row = widened<Isa>(x, token, scratch);
    const std::uint32_t bits = peak_bits(row, x.columns);
    std::int8_t* values = out.values + token * out.stride;
    std::int32_t* sums = out.sums + token * out.segments;
    // Below 2^-120 the inverse would overflow: such a token counts as zeros.
    const bool finite = bits < 0x7f800000u;
    if (!finite || bits < std::bit_cast<std::uint32_t>(0x1p-120f)) {
        std::memset(values, 0, static_cast<std::size_t>(out.stride));
        std::memset(sums, 0, sizeof(*sums) * static_cast<std::size_t>(out.segments));
        out.scales[token] = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        return;
    }
    const float peak = std::bit_cast<float>(bits);
    out.scales[token] = peak / 127.0f;
    for (std::int64_t s = 0; s < out.segments; ++s, values += segments.padded) {
        const Range span = segments.span(s);
        const std::int64_t count = span.end - span.begin;
        sums[s] = round_int8(row + span.begin, count, 127.0f / peak, values);
        std::memset(values + count, 0, static_cast<std::size_t>(segments.padded - count));
    }
}

template <class Isa>
void widen_token(const Rows& x, const Segments& segments, std::int64_t token, float* scratch, const FloatTokens& out) {
    const float* row = widened<Isa>(x, token, scratch);
    float* values = out.values + token * out.stride;
    for (std::int64_t s = 0; s < segments.count(); ++s, values += segments.padded) {
        const Range span = segments.span(s);
        const auto count = static_cast<std::size_t>(span.end - span.begin);
        std::memcpy(values, row + span.begin, sizeof(float) * count);
        std::memset(values + count, 0, sizeof(float) * (static_cast<std::size_t>(segments.padded) - count));
    }
}

}  // namespace
}  // namespace upq::cpu

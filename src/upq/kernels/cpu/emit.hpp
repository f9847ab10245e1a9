#pragma once

#include <cstring>

#include "layout.hpp"
#include "reals.hpp"

namespace upq::cpu {
namespace {

// The first n of `count` values: of all of them, as they almost always are, with vectors and without a call.
template <class T, int count>
[[gnu::always_inline]] inline void copy(T* to, const T* from, int n) {
    if (n == count)
        std::memcpy(to, from, sizeof(T) * count);
    else
        std::memcpy(to, from, sizeof(T) * static_cast<std::size_t>(n));
}

// The products of one token with rows [row, row + count), to which the bias is added, into the output in its type.
// Rows from `rows` on are padding and are left out. Overwrites `line`.
template <class Isa, int count>
[[gnu::noinline]] void emit(const Output& y, std::int64_t token, std::int64_t row, std::int64_t rows, float* line) {
    const std::int64_t left = rows - row;
    if (left <= 0) return;
    const int n = left < count ? static_cast<int>(left) : count;
    if (y.bias)
        for (int i = 0; i < n; ++i) line[i] += widen(y.bias, y.bias_real, row + i);
    const std::int64_t at = token * rows + row;
    if (y.real == Real::f32) return copy<float, count>(static_cast<float*>(y.data) + at, line, n);
    std::uint16_t halves[count];
    if (y.real == Real::f16)
        for (int i = 0; i < count; i += Isa::lanes) Isa::store_f16(halves + i, Isa::load(line + i));
    else
        for (int i = 0; i < count; ++i) halves[i] = narrow_bf16(line[i]);
    copy<std::uint16_t, count>(static_cast<std::uint16_t*>(y.data) + at, halves, n);
}

}  // namespace
}  // namespace upq::cpu

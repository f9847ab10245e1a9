// The steps of a decoder between its products: norms, positions, attention, and products with weights that stayed dense.
//
// Everything is float32 and has internal linkage, for the reason given in tile.hpp.

#pragma once

#include <cmath>

#include "kernels.hpp"
#include "tile.hpp"

namespace upq::cpu {
namespace {

template <class Isa>
float total(typename Isa::Floats v) {
    alignas(64) float line[Isa::lanes];
    Isa::store(line, v);
    float sum = 0.0f;
    for (const float part : line) sum += part;
    return sum;
}

// Σ a·b. Four sums at a time hide the latency of a multiply-add.
template <class Isa>
float dot(const float* a, const float* b, std::int64_t n) {
    constexpr int V = Isa::lanes, ways = 4;
    typename Isa::Floats sums[ways];
    unroll<ways>([&](auto w) { sums[w] = Isa::splat(0.0f); });
    std::int64_t i = 0;
    for (; i + ways * V <= n; i += ways * V)
        unroll<ways>([&](auto w) { sums[w] = Isa::fma(Isa::load(a + i + w * V), Isa::load(b + i + w * V), sums[w]); });
    for (; i + V <= n; i += V) sums[0] = Isa::fma(Isa::load(a + i), Isa::load(b + i), sums[0]);
    float sum = total<Isa>(Isa::add(Isa::add(sums[0], sums[1]), Isa::add(sums[2], sums[3])));
    for (; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// The same with a row of a dense weight in the type it is stored in.
template <class Isa>
float dot_row(const void* row, Real real, const float* x, std::int64_t n) {
    if (real == Real::f32) return dot<Isa>(static_cast<const float*>(row), x, n);
    constexpr int V = Isa::lanes, ways = 4;
    typename Isa::Floats sums[ways];
    unroll<ways>([&](auto w) { sums[w] = Isa::splat(0.0f); });
    std::int64_t i = 0;
    for (; i + ways * V <= n; i += ways * V)
        unroll<ways>([&](auto w) {
            sums[w] = Isa::fma(load_reals<Isa>(row, real, i + w * V), Isa::load(x + i + w * V), sums[w]);
        });
    for (; i + V <= n; i += V) sums[0] = Isa::fma(load_reals<Isa>(row, real, i), Isa::load(x + i), sums[0]);
    float sum = total<Isa>(Isa::add(Isa::add(sums[0], sums[1]), Isa::add(sums[2], sums[3])));
    for (; i < n; ++i) sum += widen(row, real, i) * x[i];
    return sum;
}

// y[t][r] = Σ w[r]·x[t] for rows [rows.begin, rows.end) of a dense weight.
template <class Isa>
void dense(const Dense& w, const float* x, std::int64_t tokens, Range rows, float* y) {
    const std::int64_t bytes = w.columns * (w.real == Real::f32 ? 4 : 2);
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
        const auto* row = static_cast<const std::uint8_t*>(w.data) + r * bytes;
        for (std::int64_t t = 0; t < tokens; ++t)
            y[t * w.rows + r] = dot_row<Isa>(row, w.real, x + t * w.columns, w.columns);
    }
}

// x / √(mean(x²) + ε) · weight
template <class Isa>
void rms_norm(const float* x, const float* weight, float eps, std::int64_t n, float* y) {
    const float inverse = 1.0f / std::sqrt(dot<Isa>(x, x, n) / static_cast<float>(n) + eps);
    for (std::int64_t i = 0; i < n; ++i) y[i] = weight[i] * (x[i] * inverse);
}

// e^x to 2 units in the last place, without a branch or a call, so that loops around it become vectors.
inline float exponential(float x) {
    const float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    constexpr float shift = 12582912.0f;  // rounds to an integer, see tokens.hpp
    const float shifted = clamped * 1.44269504f + shift;
    const float whole = shifted - shift;
    const float r = clamped - whole * 0.693359375f - whole * -2.12194440e-4f;  // ln 2 in two parts
    float p = 1.9875691500e-4f;  // Cephes expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const std::int32_t exponent = std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(shift);
    return std::bit_cast<float>(std::bit_cast<std::int32_t>(p) + (exponent << 23));
}

// gate = silu(gate) · up
template <class Isa>
void gated(float* gate, const float* up, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// One head's answer to one query: softmax(scaling · q·kᵀ) · v over `positions` keys and values, `dim` apart.
template <class Isa>
void attend(
    const float* query, const float* keys, const float* values, std::int64_t positions, std::int64_t dim, float scaling,
    float* scores, float* out
) {
    constexpr int V = Isa::lanes;
    float peak = -INFINITY;
    for (std::int64_t p = 0; p < positions; ++p) {
        scores[p] = scaling * dot<Isa>(query, keys + p * dim, dim);
        peak = scores[p] > peak ? scores[p] : peak;
    }
    for (std::int64_t p = 0; p < positions; ++p) scores[p] = exponential(scores[p] - peak);
    float sum = 0.0f;
    for (std::int64_t p = 0; p < positions; ++p) sum += scores[p];
    for (std::int64_t d = 0; d < dim; ++d) out[d] = 0.0f;
    for (std::int64_t p = 0; p < positions; ++p) {
        const float share = scores[p] / sum, *value = values + p * dim;
        std::int64_t d = 0;
        const auto shares = Isa::splat(share);
        for (; d + V <= dim; d += V) Isa::store(out + d, Isa::fma(shares, Isa::load(value + d), Isa::load(out + d)));
        for (; d < dim; ++d) out[d] += share * value[d];
    }
}

}  // namespace
}  // namespace upq::cpu

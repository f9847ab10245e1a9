// What a training step does beside its products, each in one pass over memory: SEQ's fake quantisation with its gradient,
// and the generalised Jensen-Shannon divergence with its own. In torch each is a dozen passes.
//
// Compiled for several instruction sets, so with internal linkage (tile.hpp). Plain loops, which compilers turn into
// vectors: no product and sum is fused, so weights are those of torch bit for bit. Sums are kept in `parts`, in an order
// that no instruction set changes.

#pragma once

#include <bit>
#include <cstdint>
#include <memory>

#include "steps.hpp"

namespace upq::cpu {
namespace {

inline constexpr int parts = 16;
// Terms that a part adds up in float before they go to the total in double: 100,000 equal terms would lose 1e-3.
inline constexpr std::int64_t terms = 128 * parts;

// term(i) summed over [0, n). Vectors where `term` has no branch.
template <class Term>
[[gnu::always_inline]] inline double sum_of(std::int64_t n, Term&& term) {
    double total = 0.0;
    std::int64_t i = 0;
    while (n - i >= parts) {
        float part[parts] = {};
        const std::int64_t end = i + (n - i < terms ? (n - i) / parts * parts : terms);
        for (; i < end; i += parts)
            for (int j = 0; j < parts; ++j) part[j] += term(i + j);
        for (const float each : part) total += each;
    }
    for (; i < n; ++i) total += term(i);
    return total;
}

// Level of u = w / scale, in steps: floor(u) + ½, clipped to ±(n - ½). NaN stays NaN.
inline float level(float u, float n) {
    const float most = n - 0.5f, inside = u < -n ? -n : u > most ? most : u;
    constexpr float shift = 12582912.0f;  // 1.5 · 2^23: rounds to an integer
    const float nearest = (inside + shift) - shift;
    return nearest - (nearest > inside ? 1.0f : 0.0f) + 0.5f;
}

// out = fake quantisation of some groups: scale · level(w / scale), 2n levels.
inline void fake_seq(const float* w, const float* scale, Range groups, std::int64_t size, float n, float* out) {
    for (std::int64_t g = groups.begin; g < groups.end; ++g) {
        const float step = scale[g];
        const float* from = w + g * size;
        float* to = out + g * size;
        for (std::int64_t i = 0; i < size; ++i) to[i] = level(from[i] / step, n) * step;
    }
}

// Straight-through gradients of it (seq.py): of w where |w / scale| < bound, and of Δ = n · scale, times `factor`.
inline void seq_gradient(
    const float* grad, const float* w, const float* scale, Range groups, std::int64_t size, float n, float bound,
    float factor, float* d_w, float* d_delta
) {
    for (std::int64_t g = groups.begin; g < groups.end; ++g) {
        const float step = scale[g];
        const float *from = w + g * size, *given = grad + g * size;
        float* to = d_w + g * size;
        const double sum = sum_of(size, [&](std::int64_t i) {
            const float u = from[i] / step, part = (u < 0.0f ? -u : u) < bound ? 1.0f : 0.0f;
            to[i] = given[i] * part;
            return given[i] * (level(u, n) - part * u);
        });
        d_delta[g] = static_cast<float>(sum / n) * factor;
    }
}

// log x of a normal number above 0, within 2e-7 relative (Cephes' polynomial); NaN stays NaN.
inline float logarithm(float x) {
    const auto bits = std::bit_cast<std::int32_t>(x);
    const std::int32_t up = (bits & 0x7fffff) > 0x3504f3 ? 1 : 0;  // mantissa above √2: halved, with the exponent one up
    const auto exponent = static_cast<float>((bits >> 23) - 127 + up);
    const float f = std::bit_cast<float>((bits & 0x7fffff) | ((127 - up) << 23)) - 1.0f, z = f * f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float y = p * f * z + exponent * -2.12194440e-4f - 0.5f * z;
    return x == x ? f + y + exponent * 0.693359375f : x;
}

template <Real real>
[[gnu::always_inline]] inline float logit(const void* data, std::int64_t i) {
    if constexpr (real == Real::f32) return static_cast<const float*>(data)[i];
    return widen_bf16(static_cast<const std::uint16_t*>(data)[i]);
}

// A distribution's logits: e^(z - top) of each goes to `powers`; `share` is the inverse of their sum, `log_sum` log Σ e^z
// and `lost` what its rounding to float took from it, up to 5e-7: every logarithm is too large by it, and so is a KL.
struct Normalised {
    float log_sum, share;
    double lost;
};

template <Real real>
Normalised normalise(const void* z, std::int64_t n, float* __restrict powers) {
    float most[parts];
    for (float& each : most) each = logit<real>(z, 0);
    std::int64_t i = 0;
    for (; i + parts <= n; i += parts)
        for (int j = 0; j < parts; ++j) {
            const float value = logit<real>(z, i + j);
            most[j] = value > most[j] ? value : most[j];
        }
    float top = most[0];
    for (const float each : most) top = each > top ? each : top;
    for (; i < n; ++i) top = logit<real>(z, i) > top ? logit<real>(z, i) : top;
    const double sum = sum_of(n, [&](std::int64_t k) { return powers[k] = exponential(logit<real>(z, k) - top); });
    const double exact = top + __builtin_log(sum);
    const auto rounded = static_cast<float>(exact);
    return {rounded, static_cast<float>(1.0 / sum), exact - rounded};
}

// Value and gradient (gjs.py) of one token: β·KL(p‖m) + (1-β)·KL(q‖m), m = β·p + (1-β)·q, p of the teacher's logits.
// `scratch` takes n floats.
template <Real student_real, Real teacher_real>
float gjs_token(
    const void* student, const void* teacher, std::int64_t n, float beta, float* __restrict scratch, float* __restrict grad
) {
    const Normalised own = normalise<student_real>(student, n, grad), its = normalise<teacher_real>(teacher, n, scratch);
    constexpr std::int64_t stretch = 2048;  // stays in the first-level cache between the two sums
    alignas(64) float of_teacher[stretch];
    double kl_q = 0.0, kl_p = 0.0;
    for (std::int64_t first = 0; first < n; first += stretch) {
        const std::int64_t count = n - first < stretch ? n - first : stretch;
        kl_q += sum_of(count, [&](std::int64_t k) {
            const std::int64_t i = first + k;
            const float q = grad[i] * own.share, p = scratch[i] * its.share;
            const float logm = logarithm(beta * p + (1.0f - beta) * q);
            of_teacher[k] = p * (logit<teacher_real>(teacher, i) - its.log_sum - logm);
            scratch[i] = q;
            return grad[i] = q * (logit<student_real>(student, i) - own.log_sum - logm);
        });
        kl_p += sum_of(count, [&](std::int64_t k) { return of_teacher[k]; });
    }
    // d/dz: the terms through m cancel against q's own; (1-β)·q·(log(q/m) - KL(q‖m)) is left.
    const auto mean = static_cast<float>(kl_q);
    for (std::int64_t i = 0; i < n; ++i) grad[i] = (1.0f - beta) * (grad[i] - scratch[i] * mean);
    return static_cast<float>(beta * (kl_p - its.lost) + (1.0f - beta) * (kl_q - own.lost));
}

inline void gjs(const Rows& student, const Rows& teacher, Range tokens, float beta, float* value, float* grad) {
    const auto n = student.columns;
    const std::unique_ptr<float[]> scratch(new float[static_cast<std::size_t>(n)]);
    const auto each = [&]<Real s, Real t>() {
        const auto row = [](const Rows& of, std::int64_t token, std::int64_t bytes) {
            return static_cast<const std::uint8_t*>(of.data) + token * of.columns * bytes;
        };
        for (std::int64_t i = tokens.begin; i < tokens.end; ++i)
            value[i] = gjs_token<s, t>(
                row(student, i, s == Real::f32 ? 4 : 2), row(teacher, i, t == Real::f32 ? 4 : 2), n, beta, scratch.get(), grad + i * n
            );
    };
    const bool s = student.real == Real::f32, t = teacher.real == Real::f32;
    if (s && t) return each.template operator()<Real::f32, Real::f32>();
    if (s) return each.template operator()<Real::f32, Real::bf16>();
    if (t) return each.template operator()<Real::bf16, Real::f32>();
    each.template operator()<Real::bf16, Real::bf16>();
}

}  // namespace
}  // namespace upq::cpu

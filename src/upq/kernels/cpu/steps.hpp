// What a decoder does between its products: norms, the gate of its MLP, attention; and products with weights that stayed
// dense. Everything is float32, and has internal linkage for the reason given in tile.hpp.

#pragma once

#include <bit>
#include <limits>
#include <type_traits>

#include "kernels.hpp"
#include "reals.hpp"
#include "tile.hpp"

namespace upq::cpu {
namespace {

// Sums kept apart, so that one multiply-add need not wait for the last: four hide its latency.
inline constexpr int ways = 4;

// Σ row·x for one row of a dense weight, or for any two vectors with Real::f32.
template <class Isa>
float dot_row(const void* row, Real real, const float* x, std::int64_t n) {
    constexpr int V = Isa::lanes;
    typename Isa::Floats sums[ways];
    unroll<ways>([&](auto w) { sums[w] = Isa::splat(0.0f); });
    std::int64_t i = 0;
    for (; i + ways * V <= n; i += ways * V)
        unroll<ways>([&](auto w) {
            sums[w] = Isa::fma(load_reals<Isa>(row, real, i + w * V), Isa::load(x + i + w * V), sums[w]);
        });
    for (; i + V <= n; i += V) sums[0] = Isa::fma(load_reals<Isa>(row, real, i), Isa::load(x + i), sums[0]);
    alignas(64) float line[V];
    Isa::store(line, Isa::add(Isa::add(sums[0], sums[1]), Isa::add(sums[2], sums[3])));
    float sum = 0.0f;
    for (const float part : line) sum += part;
    for (; i < n; ++i) sum += widen(row, real, i) * x[i];
    return sum;
}

// The sum over the lanes, halves added to halves.
template <class Isa>
float sum_lanes(typename Isa::Floats v) {
    alignas(64) float line[Isa::lanes];
    Isa::store(line, v);
    for (int half = Isa::lanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) line[i] += line[i + half];
    return line[0];
}

// The same of R vectors. With four, an instruction set has its own: one at a time through memory took as long as half of
// the products of 576 columns.
template <class Isa, int R>
void sum_lanes(const typename Isa::Floats (&v)[R], float* out) {
    if constexpr (R == 4 && requires { Isa::sum_lanes(v, out); })
        Isa::sum_lanes(v, out);
    else
        unroll<R>([&](auto r) { out[r] = sum_lanes<Isa>(v[r]); });
}

// M tokens with R rows, a sum in registers for each pair. Every sum takes the columns in the same order, whatever M and R.
template <class Isa, Real real, int M, int R>
[[gnu::flatten]] void dense_tile(const Dense& w, const float* x, std::int64_t row, float* y) {
    constexpr int V = Isa::lanes;
    const std::int64_t n = w.columns, real_bytes = real == Real::f32 ? 4 : 2;
    const auto* rows = static_cast<const std::uint8_t*>(w.data) + row * n * real_bytes;
    typename Isa::Floats sums[M][R];
    unroll<M>([&](auto m) { unroll<R>([&](auto r) { sums[m][r] = Isa::splat(0.0f); }); });
    std::int64_t i = 0;
    for (; i + V <= n; i += V) {
        typename Isa::Floats tokens[M];
        unroll<M>([&](auto m) { tokens[m] = Isa::load(x + m * n + i); });
        unroll<R>([&](auto r) {
            const auto held = load_reals<Isa>(rows + r * n * real_bytes, real, i);
            unroll<M>([&](auto m) { sums[m][r] = Isa::fma(held, tokens[m], sums[m][r]); });
        });
    }
    unroll<M>([&](auto m) {
        float line[R];
        sum_lanes<Isa, R>(sums[m], line);
        unroll<R>([&](auto r) {
            for (std::int64_t j = i; j < n; ++j) line[r] += widen(rows + r * n * real_bytes, real, j) * x[m * n + j];
            y[m * w.rows + r] = line[r];
        });
    });
}

// `rows` with all tokens; 12 or 24 sums are held at a time.
template <class Isa, Real real>
void dense_rows(const Dense& w, const float* x, std::int64_t tokens, Range rows, float* y) {
    constexpr int R = 4, most = Isa::tile_tokens > 4 ? 6 : 3;
    using Tile = decltype(&dense_tile<Isa, real, 1, 1>);
    Tile tall[most], flat[most];  // by number of tokens, from 1
    unroll<most>([&](auto m) {
        tall[m] = dense_tile<Isa, real, m + 1, R>;
        flat[m] = dense_tile<Isa, real, m + 1, 1>;
    });
    for (std::int64_t r = rows.begin, step; r < rows.end; r += step) {
        step = rows.end - r < R ? 1 : R;
        for (std::int64_t t = 0; t < tokens; t += most) {
            const std::int64_t count = tokens - t < most ? tokens - t : most;
            (step == R ? tall : flat)[count - 1](w, x + t * w.columns, r, y + t * w.rows + r);
        }
    }
}

// y[t][r] = Σ w[r]·x[t] for rows [rows.begin, rows.end). An output depends on its token and its row alone.
template <class Isa>
void dense(const Dense& w, const float* x, std::int64_t tokens, Range rows, float* y) {
    if (w.real == Real::f32) return dense_rows<Isa, Real::f32>(w, x, tokens, rows, y);
    if (w.real == Real::f16) return dense_rows<Isa, Real::f16>(w, x, tokens, rows, y);
    dense_rows<Isa, Real::bf16>(w, x, tokens, rows, y);
}

// y = weight · x / √(mean(x²) + ε); y may be x.
template <class Isa>
void rms_norm(const float* x, const float* weight, float eps, std::int64_t n, float* y) {
    const float mean = dot_row<Isa>(x, Real::f32, x, n) / static_cast<float>(n);
    const float inverse = 1.0f / __builtin_sqrtf(mean + eps);
    for (std::int64_t i = 0; i < n; ++i) y[i] = weight[i] * (x[i] * inverse);
}

// e^x between -87 and 88, where it is a normal number, and its ends' value outside; NaN stays NaN. Within 2e-7 (Cephes'
// polynomial). Without a branch or a call, so that compilers make vectors of the loops around it.
inline float exponential(float x) {
    const float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    constexpr float shift = 12582912.0f;  // rounds to an integer, see tokens.hpp
    const float shifted = clamped * 1.44269504f + shift;
    const float whole = shifted - shift;
    const float r = clamped - whole * 0.693359375f - whole * -2.12194440e-4f;  // ln 2 in two parts
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const std::uint32_t exponent = std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(shift);
    return p * std::bit_cast<float>((exponent + 127u) << 23);
}

// out = f(gate) · up; out may be gate. GELU by tanh is x · σ(2u): ½ (1 + tanh u) = σ(2u).
template <class Isa>
void gated(Activation activation, const float* gate, const float* up, std::int64_t n, float* out) {
    if (activation == Activation::silu) {
        for (std::int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
        return;
    }
    constexpr float twice_root = 1.5957691216f;  // 2 √(2/π)
    for (std::int64_t i = 0; i < n; ++i) {
        const float x = gate[i], u = twice_root * (x + 0.044715f * x * x * x);
        out[i] = x / (1.0f + exponential(-u)) * up[i];
    }
}

// The scores of one block of keys.
template <class Isa>
[[gnu::flatten]] void score(const float* query, const float* keys, std::int64_t dim, float scaling, float* scores) {
    constexpr int V = Isa::lanes, N = key_block / V, features = N < ways ? ways / N : 1;  // at one time
    typename Isa::Floats sums[features][N];
    unroll<features>([&](auto f) { unroll<N>([&](auto n) { sums[f][n] = Isa::splat(0.0f); }); });
    const auto add = [&](auto f, std::int64_t d) __attribute__((always_inline)) {
        const auto feature = Isa::splat(query[d]);
        unroll<N>([&](auto n) { sums[f][n] = Isa::fma(feature, Isa::load(keys + d * key_block + n * V), sums[f][n]); });
    };
    std::int64_t d = 0;
    for (; d + features <= dim; d += features) unroll<features>([&](auto f) { add(f, d + f); });
    for (; d < dim; ++d) add(std::integral_constant<int, 0>{}, d);
    unroll<N>([&](auto n) {
        auto sum = sums[0][n];
        unroll<features - 1>([&](auto f) { sum = Isa::add(sum, sums[f + 1][n]); });
        Isa::store(scores + n * V, Isa::mul(sum, Isa::splat(scaling)));
    });
}

// Whole blocks of scores to their softmax; -infinity stands where there is none. Maxima and sums go by column of the
// blocks, which compilers turn into vectors without being allowed to reorder anything.
inline void softmax(float* scores, std::int64_t n) {
    float peaks[key_block], sums[key_block] = {};
    for (float& peak : peaks) peak = -std::numeric_limits<float>::infinity();
    for (std::int64_t i = 0; i < n; i += key_block)
        for (int j = 0; j < key_block; ++j) peaks[j] = scores[i + j] > peaks[j] ? scores[i + j] : peaks[j];
    float peak = peaks[0], sum = 0.0f;
    for (const float other : peaks) peak = other > peak ? other : peak;
    for (std::int64_t i = 0; i < n; i += key_block)
        for (int j = 0; j < key_block; ++j) {
            scores[i + j] = exponential(scores[i + j] - peak);
            sums[j] += scores[i + j];
        }
    for (const float part : sums) sum += part;
    for (std::int64_t i = 0; i < n; ++i) scores[i] /= sum;
}

// out += Σ share·value over some positions.
template <class Isa>
[[gnu::flatten]] void weigh(const float* shares, const float* values, std::int64_t positions, std::int64_t dim, float* out) {
    constexpr int V = Isa::lanes;
    std::int64_t d = 0;
    for (; d + ways * V <= dim; d += ways * V) {
        typename Isa::Floats sums[ways];
        unroll<ways>([&](auto w) { sums[w] = Isa::load(out + d + w * V); });
        for (std::int64_t p = 0; p < positions; ++p) {
            const auto share = Isa::splat(shares[p]);
            unroll<ways>([&](auto w) { sums[w] = Isa::fma(share, Isa::load(values + p * dim + d + w * V), sums[w]); });
        }
        unroll<ways>([&](auto w) { Isa::store(out + d + w * V, sums[w]); });
    }
    for (; d + V <= dim; d += V) {
        auto sum = Isa::load(out + d);
        for (std::int64_t p = 0; p < positions; ++p)
            sum = Isa::fma(Isa::splat(shares[p]), Isa::load(values + p * dim + d), sum);
        Isa::store(out + d, sum);
    }
    for (; d < dim; ++d)
        for (std::int64_t p = 0; p < positions; ++p) out[d] += shares[p] * values[p * dim + d];
}

// Keys or values of one block in float32: where they lie, or in `scratch`. `by_feature`: keys.
template <class Isa>
const float* in_float(const std::uint8_t* at, std::int64_t dim, Stored stored, bool by_feature, float* scratch) {
    if (stored == Stored::f32) return reinterpret_cast<const float*>(at);
    const auto* codes = reinterpret_cast<const std::int8_t*>(at);
    const auto* scales = reinterpret_cast<const float*>(at + key_block * dim);
    if (by_feature)
        for (std::int64_t d = 0; d < dim; ++d)
            for (int p = 0; p < key_block; ++p)
                scratch[d * key_block + p] = static_cast<float>(codes[d * key_block + p]) * scales[p];
    else
        for (int p = 0; p < key_block; ++p)
            for (std::int64_t d = 0; d < dim; ++d)
                scratch[p * dim + d] = static_cast<float>(codes[p * dim + d]) * scales[p];
    return scratch;
}

// softmax(scaling · q·kᵀ) · v over the positions `seen`, for `count` queries [count][dim] that share a head's keys and
// values: each block of these is read once for all. `scratch` takes count · (positions + 2 · key_block) floats for the
// scores and key_block · dim for a block.
template <class Isa>
void attend(
    const Cached& cache, const float* queries, std::int64_t count, Range seen, float scaling, float* scratch, float* out
) {
    const std::int64_t dim = cache.dim, first = seen.begin / key_block * key_block;
    const std::int64_t stride = (seen.end - first + key_block - 1) / key_block * key_block;
    float *const scores = scratch, *const held = scratch + count * stride;
    for (std::int64_t block = first; block < seen.end; block += key_block) {
        const float* keys = in_float<Isa>(cache.blocks[block / key_block] + cache.keys, dim, cache.stored, true, held);
        for (std::int64_t q = 0; q < count; ++q)
            score<Isa>(queries + q * dim, keys, dim, scaling, scores + q * stride + block - first);
    }
    for (std::int64_t q = 0; q < count; ++q) {
        float* row = scores + q * stride;
        for (std::int64_t i = 0; i < seen.begin - first; ++i) row[i] = -std::numeric_limits<float>::infinity();
        for (std::int64_t i = seen.end - first; i < stride; ++i) row[i] = -std::numeric_limits<float>::infinity();
        softmax(row, stride);
    }
    for (std::int64_t i = 0; i < count * dim; ++i) out[i] = 0.0f;
    for (std::int64_t block = first; block < seen.end; block += key_block) {
        const float* values = in_float<Isa>(cache.blocks[block / key_block] + cache.values, dim, cache.stored, false, held);
        const std::int64_t begin = block < seen.begin ? seen.begin : block;
        const std::int64_t end = seen.end < block + key_block ? seen.end : block + key_block;
        for (std::int64_t q = 0; q < count; ++q)
            weigh<Isa>(
                scores + q * stride + begin - first, values + (begin - block) * dim, end - begin, dim, out + q * dim
            );
    }
}

}  // namespace
}  // namespace upq::cpu

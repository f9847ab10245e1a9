// What AVX2 and AVX-VNNI share: 256-bit vectors, 16 registers. They differ in the int8 dot product.

#pragma once

#include <immintrin.h>

#include "table.hpp"

namespace upq::cpu {
namespace {

// The sums over the lanes of four vectors, halves added to halves: (0 + 2) + (1 + 3).
inline void sum_quarters(__m128 a, __m128 b, __m128 c, __m128 d, float* out) {
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
}

inline __m128 fold_half(__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

struct Avx256 {
    static constexpr int lanes = 8, tile_tokens = 4;
    using Bytes = __m256i;
    using Ints = __m256i;
    using Floats = __m256;
    using Quad = __m256i;

    static constexpr int code_offset(int) { return 0; }
    static constexpr bool unpacking_pays() { return true; }

    static Bytes load_bytes(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

    static Quad broadcast(const std::int8_t* p) {
        std::int32_t quad;
        std::memcpy(&quad, p, 4);
        return _mm256_set1_epi32(quad);
    }

    template <int shift, int mask>
    static Bytes field(Bytes v) {
        if constexpr (mask == 255) return v;
        return _mm256_and_si256(shift ? _mm256_srli_epi16(v, shift) : v, _mm256_set1_epi8(static_cast<char>(mask)));
    }

    template <int shift, int mask>
    static Ints lane_field(Bytes v) {
        return _mm256_and_si256(_mm256_srli_epi32(v, shift), _mm256_set1_epi32(mask));
    }

    template <int n>
    static Ints shift_down(Ints v) { return _mm256_srai_epi32(v, n); }

    static Ints splat(std::int32_t v) { return _mm256_set1_epi32(v); }
    static Floats splat(float v) { return _mm256_set1_ps(v); }
    static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats to_float(Ints v) { return _mm256_cvtepi32_ps(v); }

    static Floats load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
    static void sum_lanes(const Floats (&v)[4], float* out) {
        sum_quarters(fold_half(v[0]), fold_half(v[1]), fold_half(v[2]), fold_half(v[3]), out);
    }

    static __m128i halves(const std::uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static Floats load_f16(const std::uint16_t* p) { return _mm256_cvtph_ps(halves(p)); }
    static Floats load_bf16(const std::uint16_t* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves(p)), 16));
    }
    static void store_f16(std::uint16_t* p, Floats v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
};

}  // namespace
}  // namespace upq::cpu

// 512-bit vectors with int8 dot products: Intel servers from Cascade Lake, AMD from Zen 4.

#include <immintrin.h>

#include "avx256.hpp"

namespace upq::cpu {

namespace {

struct Avx512Vnni {
    static constexpr bool direct_sums = true;
    static constexpr int lanes = 16, tile_tokens = 8;
    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;
    using Quad = __m512i;

    static constexpr int code_offset(int) { return 0; }

    // On Intel masks and shifts take the ports of the dot product. AMD has others for them, and its first-level cache is
    // too small for unpacked codes: 64 tokens run at 209 GMAC/s without, and at 191 with them (Zen 4).
    static bool unpacking_pays() {
        static const bool amd = __builtin_cpu_is("amd");
        return !amd;
    }

    // 32 registers: 16 sums for 8 tokens, and as many planes as fit where tokens are few.
    static constexpr Shape shape(int width, int tokens) {
        const int fields = 8 / width, planes = tokens <= 2 ? 4 : tokens <= 4 ? 2 : 1;
        return {2, fields < planes ? fields : planes};
    }

    static Bytes load_bytes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }

    static Quad broadcast(const std::int8_t* p) {
        std::int32_t quad;
        std::memcpy(&quad, p, 4);
        return _mm512_set1_epi32(quad);
    }

    template <int shift, int mask>
    static Bytes field(Bytes v) {
        if constexpr (mask == 255) return v;
        return _mm512_and_si512(shift ? _mm512_srli_epi16(v, shift) : v, _mm512_set1_epi8(static_cast<char>(mask)));
    }

    template <int shift, int mask>
    static Ints lane_field(Bytes v) {
        return _mm512_and_si512(_mm512_srli_epi32(v, shift), _mm512_set1_epi32(mask));
    }

    template <int width>
    static Ints dot(Ints sum, Bytes codes, Quad values) { return _mm512_dpbusd_epi32(sum, codes, values); }

    template <int n>
    static Ints shift_down(Ints v) { return _mm512_srai_epi32(v, n); }

    static Ints splat(std::int32_t v) { return _mm512_set1_epi32(v); }
    static Floats splat(float v) { return _mm512_set1_ps(v); }
    static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }

    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
    static void sum_lanes(const Floats (&v)[4], float* out) {
        sum_quarters(fold(v[0]), fold(v[1]), fold(v[2]), fold(v[3]), out);
    }
    static __m128 fold(Floats v) {
        const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
        return fold_half(_mm256_add_ps(_mm512_castps512_ps256(v), high));
    }

    static __m256i halves(const std::uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Floats load_f16(const std::uint16_t* p) { return _mm512_cvtph_ps(halves(p)); }
    static Floats load_bf16(const std::uint16_t* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(p)), 16));
    }
    static void store_f16(std::uint16_t* p, Floats v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
};

}  // namespace

extern const Kernels avx512vnni = kernels_of<Avx512Vnni>("avx512vnni");

}  // namespace upq::cpu

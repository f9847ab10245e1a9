// 256-bit vectors without int8 dot products: Intel from Haswell, AMD from Zen.

#include "avx256.hpp"

namespace upq::cpu {

namespace {

struct Avx2 : Avx256 {
    // As AvxVnni, but codes of 4 bits must be shifted down: see dot().
    static constexpr Shape shape(int width, int tokens) {
        if (tokens == 1) return {4, width == 2 ? 2 : 1};
        return {2, tokens == 2 && width == 2 ? 2 : 1};
    }

    template <int width>
    static Ints dot(Ints sum, Bytes codes, Quad values) {
        const Ints ones = _mm256_set1_epi16(1);
        // vpmaddubsw adds two products in a signed 16-bit lane that saturates: 2 · 15 · 127 fits, 2 · 255 · 127 does
        // not. So codes of 8 bits come as two halves, of which the upper counts 16 times.
        if constexpr (width < 8) return sums_of_four(sum, codes, values, ones);
        const Ints low = _mm256_set1_epi8(15);
        sum = sums_of_four(sum, _mm256_and_si256(codes, low), values, ones);
        codes = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
        return sums_of_four(sum, codes, values, _mm256_set1_epi16(16));
    }

    static Ints sums_of_four(Ints sum, Bytes codes, Quad values, Ints factor) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, values), factor));
    }
};

}  // namespace

extern const Kernels avx2 = kernels_of<Avx2>("avx2");

}  // namespace upq::cpu

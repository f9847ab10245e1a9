// 256-bit vectors without int8 dot products: Intel from Haswell, AMD from Zen.

#include "avx256.hpp"

namespace upq::cpu {

namespace {

struct Avx2 : Avx256 {
    static constexpr bool direct_sums = false;
    // 16 registers: 4 sums, and 4 of the block's own.
    static constexpr Shape shape(int, int tokens) { return {tokens == 1 ? 4 : 1, 1}; }

    // vpmaddubsw adds two products in a signed 16-bit lane that saturates. Codes of 2 and 4 bits are far from that: even
    // the sums of a block, 4 · 2 · 3 · 127 and 2 · 2 · 15 · 127, fit 16 bits and are widened once. Codes of 8 bits are
    // not: they come as two halves, of which the upper counts 16 times, and are widened at once.
    template <int width>
    static Ints block(Ints sum) { return width < 8 ? _mm256_setzero_si256() : sum; }

    template <int width>
    static Ints dot(Ints part, Bytes codes, Quad values) {
        if constexpr (width < 8) return _mm256_add_epi16(part, _mm256_maddubs_epi16(codes, values));
        const Ints low = _mm256_set1_epi8(15), high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
        part = widened(part, _mm256_maddubs_epi16(_mm256_and_si256(codes, low), values), 1);
        return widened(part, _mm256_maddubs_epi16(high, values), 16);
    }

    template <int width>
    static Ints end_block(Ints sum, Ints part) { return width < 8 ? widened(sum, part, 1) : part; }

    static Ints widened(Ints sum, Ints pairs, short factor) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(factor)));
    }
};

}  // namespace

extern const Kernels avx2 = kernels_of<Avx2>("avx2");

}  // namespace upq::cpu

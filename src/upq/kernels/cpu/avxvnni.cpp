// 256-bit vectors with int8 dot products: Intel's client cores from Alder Lake, AMD from Zen 5.

#include "avx256.hpp"

namespace upq::cpu {

namespace {

struct AvxVnni : Avx256 {
    static constexpr bool direct_sums = true;
    // 16 registers: 8 sums in every shape.
    static constexpr Shape shape(int width, int tokens) {
        if (tokens == 1) return {4, width < 8 ? 2 : 1};
        return {2, tokens == 2 && width < 8 ? 2 : 1};
    }

    template <int width>
    static Ints dot(Ints sum, Bytes codes, Quad values) { return _mm256_dpbusd_avx_epi32(sum, codes, values); }
};

}  // namespace

extern const Kernels avxvnni = kernels_of<AvxVnni>("avxvnni");

}  // namespace upq::cpu

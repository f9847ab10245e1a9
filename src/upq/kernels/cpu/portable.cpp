// Any machine: vectors of the compiler's own, which it turns into whatever there is.

#include "table.hpp"

namespace upq::cpu {

namespace {

using FourInts [[gnu::vector_size(16)]] = std::int32_t;

struct Portable {
    static constexpr bool direct_sums = true;
    static constexpr int lanes = 4, tile_tokens = 4;
    using Bytes [[gnu::vector_size(16)]] = std::uint32_t;  // four bytes in each lane
    using Ints = FourInts;
    using Floats [[gnu::vector_size(16)]] = float;
    struct Quad {
        std::int32_t value[4];
    };

    static constexpr int code_offset(int) { return 0; }
    static constexpr bool unpacking_pays() { return true; }
    static constexpr Shape shape(int, int) { return {2, 1}; }

    static Bytes load_bytes(const std::uint8_t* p) { return loaded<Bytes>(p); }
    static Quad broadcast(const std::int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }

    template <int shift, int mask>
    static Bytes field(Bytes v) { return v >> shift & 0x01010101u * mask; }

    template <int shift, int mask>
    static Ints lane_field(Bytes v) { return Ints(v >> shift & mask); }

    template <int width>
    static Ints dot(Ints sum, Bytes codes, Quad values) {
        unroll<4>([&](auto j) { sum += Ints(codes >> 8 * j & 255) * values.value[j]; });
        return sum;
    }

    template <int n>
    static Ints shift_down(Ints v) { return v >> n; }

    static Ints splat(std::int32_t v) { return Ints{} + v; }
    static Floats splat(float v) { return Floats{v, v, v, v}; }
    static Ints add(Ints a, Ints b) { return a + b; }
    static Floats add(Floats a, Floats b) { return a + b; }
    static Floats sub(Floats a, Floats b) { return a - b; }
    static Floats mul(Floats a, Floats b) { return a * b; }
    static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
    static Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

    static Floats load(const float* p) { return loaded<Floats>(p); }
    static void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

    static Floats load_f16(const std::uint16_t* p) {
        return Floats{widen_f16(p[0]), widen_f16(p[1]), widen_f16(p[2]), widen_f16(p[3])};
    }
    static Floats load_bf16(const std::uint16_t* p) {
        return Floats{widen_bf16(p[0]), widen_bf16(p[1]), widen_bf16(p[2]), widen_bf16(p[3])};
    }
    static void store_f16(std::uint16_t* p, Floats v) {
        for (int i = 0; i < lanes; ++i) p[i] = narrow_f16(v[i]);
    }

    template <class Vector>
    static Vector loaded(const void* p) {
        Vector v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
};

}  // namespace

extern const Kernels portable = kernels_of<Portable>("portable");

}  // namespace upq::cpu

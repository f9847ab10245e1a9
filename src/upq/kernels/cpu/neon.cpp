// 128-bit vectors with int8 dot products: Arm from v8.2 with dotprod (Cortex-A76, Neoverse N1, Apple M1).

#include <arm_neon.h>

#include "table.hpp"

namespace upq::cpu {

namespace {

struct Neon {
    static constexpr bool direct_sums = true;
    static constexpr int lanes = 4, tile_tokens = 8;
    using Bytes = uint8x16_t;
    using Ints = int32x4_t;
    using Floats = float32x4_t;
    using Quad = int8x16_t;

    // The dot product takes signed bytes. Codes up to 127 are the same; one of 8 bits is taken as code - 128, which
    // flips its highest bit.
    static constexpr int code_offset(int width) { return width == 8 ? 128 : 0; }
    static constexpr bool unpacking_pays() { return true; }

    // 32 registers: 16 sums. Planes stop where a masked code would exceed 127.
    static constexpr Shape shape(int width, int tokens) {
        if (tokens == 1) return {8, width == 2 ? 2 : 1};
        if (tokens <= 4) return {4, 1};
        return {2, 1};
    }

    static Bytes load_bytes(const std::uint8_t* p) { return vld1q_u8(p); }

    static Quad broadcast(const std::int8_t* p) {
        std::int32_t quad;
        std::memcpy(&quad, p, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(quad));
    }

    template <int shift, int mask>
    static Bytes field(Bytes v) {
        if constexpr (mask == 255) return v;
        if constexpr (shift > 0) v = vshrq_n_u8(v, shift);
        return vandq_u8(v, vdupq_n_u8(mask));
    }

    template <int shift, int mask>
    static Ints lane_field(Bytes v) {
        uint32x4_t words = vreinterpretq_u32_u8(v);
        if constexpr (shift > 0) words = vshrq_n_u32(words, shift);
        return vreinterpretq_s32_u32(vandq_u32(words, vdupq_n_u32(mask)));
    }

    template <int width>
    static Ints dot(Ints sum, Bytes codes, Quad values) {
        if constexpr (width == 8) codes = veorq_u8(codes, vdupq_n_u8(128));
        return vdotq_s32(sum, vreinterpretq_s8_u8(codes), values);
    }

    template <int n>
    static Ints shift_down(Ints v) { return vshrq_n_s32(v, n); }

    static Ints splat(std::int32_t v) { return vdupq_n_s32(v); }
    static Floats splat(float v) { return vdupq_n_f32(v); }
    static Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
    static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
    static Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
    static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static Floats to_float(Ints v) { return vcvtq_f32_s32(v); }

    static Floats load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, Floats v) { vst1q_f32(p, v); }

    static Floats load_f16(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static Floats load_bf16(const std::uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
    static void store_f16(std::uint16_t* p, Floats v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
};

}  // namespace

extern const Kernels neon = kernels_of<Neon>("neon");

}  // namespace upq::cpu

// Products of a few tokens with a few rows, held in registers: the same code for every instruction set.
//
// An instruction set is a class with vectors of `lanes` 32-bit lanes (Bytes, Ints, Floats), four int8 in every lane
// (Quad), the functions used below, and
//
//     tile_tokens           tokens that fit the registers at once
//     shape(width, tokens)  how many vectors of a panel a tile takes, and its planes (see Shape)
//     code_offset(width)    what dot() subtracts from a code: 128 where it has to take codes of 8 bits as signed
//     unpacking_pays()      whether many tokens are faster with codes unpacked once (see unpack)
//     direct_sums           whether dot() adds to the sum itself; if not (AVX2 alone),
//     block(sum)            where the dot products of one block are added up, and
//     end_block(sum, part)  the sum with these
//
// Everything here has internal linkage. The same template compiled for AVX-512 and for plain x86 would otherwise be
// one symbol to the linker, and an old machine would get the instructions of a new one.

#pragma once

#include <cstring>
#include <utility>

#include "emit.hpp"
#include "layout.hpp"

namespace upq::cpu {
namespace {

// Planes are sums of their own for the fields of a byte: a code masked in place, not shifted down, counts 2^shift
// times, and one exact shift of the sum at the end of a segment makes up for it. That saves a shift for every vector
// loaded, and more sums hide the latency of a dot product; tiles of many tokens have no registers left for it.
struct Shape {
    int vectors, planes;
};

// body(0), body(1), … with the index as a constant. Users are [[gnu::flatten]]: GCC stops inlining the bodies of large
// tiles, and their sums would go through memory.
template <int count, class Body>
[[gnu::always_inline]] inline void unroll(Body&& body) {
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
        (body(std::integral_constant<int, i>{}), ...);
    }(std::make_integer_sequence<int, count>{});
}

// Values for the rows of one vector: scales or zero points, in the type they are stored in.
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats load_reals(const void* data, Real real, std::int64_t i) {
    if (real == Real::f32) return Isa::load(static_cast<const float*>(data) + i);
    const auto* halves = static_cast<const std::uint16_t*>(data) + i;
    return real == Real::f16 ? Isa::load_f16(halves) : Isa::load_bf16(halves);
}

// Memory to prefetch ahead of the codes: 4 to 8 KiB raised a cold product from 31 to 35 GB/s (a plain read: 38).
inline constexpr std::int64_t ahead = 6144;

// Codes of some blocks one a byte: the fields of a block one after another, block_bytes for each. Tiles that share them
// skip the masks and shifts, 14 of every 78 vector instructions that a tile of 8 tokens gives to the ports it lives on.
template <class Isa, int Width>
[[gnu::flatten]] void unpack(const std::uint8_t* codes, std::int64_t blocks, std::uint8_t* out) {
    for (std::int64_t b = 0; b < blocks; ++b, codes += block_bytes, out += 8 / Width * block_bytes)
        unroll<panel_rows / Isa::lanes>([&](auto n) {
            const auto held = Isa::load_bytes(codes + n * 4 * Isa::lanes);
            unroll<8 / Width>([&](auto f) {
                const auto code = Isa::template field<Width * f, (1 << Width) - 1>(held);
                std::memcpy(out + f * block_bytes + n * 4 * Isa::lanes, &code, sizeof code);
            });
        });
}

// What a tile has summed of a panel so far, for one of its tokens.
struct Carried {
    float sums[panel_rows];
    std::int32_t dots[panel_rows];  // of a segment that is not over
};

// `unpacked`: the codes come from unpack().
template <class Isa, int Width, int M, bool unpacked = false>
struct IntTile {
    static constexpr Shape shape = Isa::shape(Width, M);
    static constexpr int V = Isa::lanes, N = shape.vectors, P = unpacked ? 1 : shape.planes;
    static constexpr int fields = 8 / Width, mask = (1 << Width) - 1;
    static constexpr int block_stride = unpacked ? fields * block_bytes : block_bytes;
    using Ints = typename Isa::Ints;
    using Floats = typename Isa::Floats;

    // Tokens [token, token + M) with all rows of `panel` and its blocks of this range, from `codes` on. What is not
    // finished with them waits in `carried`, one for each token.
    static void run(
        const Matrix& w, const std::uint8_t* codes, const IntTokens& x, const Output& y, std::int64_t panel,
        std::int64_t token, Range blocks, Carried* carried
    ) {
        for (int lane = 0; lane < panel_rows; lane += N * V) part(w, codes + 4 * lane, x, y, panel, lane, token, blocks, carried);
    }

    [[gnu::flatten]] static void part(
        const Matrix& w, const std::uint8_t* codes, const IntTokens& x, const Output& y, std::int64_t panel, int lane,
        std::int64_t token, Range blocks, Carried* carried
    ) {
        const std::int64_t segments = w.segments.count(), length = w.blocks();
        const std::int8_t* values = x.values + token * x.stride;
        Floats sum[M][N];
        Ints dots[M][N];
        if (blocks.begin == 0)
            unroll<M>([&](auto m) { unroll<N>([&](auto n) { sum[m][n] = Isa::splat(0.0f); }); });
        else
            unroll<M>([&](auto m) {
                unroll<N>([&](auto n) {
                    sum[m][n] = Isa::load(carried[m].sums + lane + n * V);
                    std::memcpy(&dots[m][n], carried[m].dots + lane + n * V, sizeof(Ints));
                });
            });
        for (std::int64_t b = blocks.begin, end; b < blocks.end; codes += (end - b) * block_stride, b = end) {
            const std::int64_t s = b / length;
            end = blocks.end < (s + 1) * length ? blocks.end : (s + 1) * length;
            std::int32_t total[M];
            unroll<M>([&](auto m) { total[m] = x.sums[(token + m) * segments + s]; });
            if (b == s * length)
                unroll<M>([&](auto m) {
                    unroll<N>([&](auto n) { dots[m][n] = Isa::splat((Isa::code_offset(Width) - w.centre) * total[m]); });
                });
            if constexpr (M * N > 8)
                dot_apart(codes, end - b, values + 4 * fields * b, x.stride, dots);
            else
                dot(codes, end - b, values + 4 * fields * b, x.stride, dots);
            if (end == (s + 1) * length) fold(w, (panel * segments + s) * panel_rows + lane, total, dots, sum);
        }
        if (blocks.end < segments * length) {
            unroll<M>([&](auto m) {
                unroll<N>([&](auto n) {
                    Isa::store(carried[m].sums + lane + n * V, sum[m][n]);
                    std::memcpy(carried[m].dots + lane + n * V, &dots[m][n], sizeof(Ints));
                });
            });
            return;
        }
        unroll<M>([&](auto m) {
            alignas(64) float line[N * V];
            const Floats scale = Isa::splat(x.scales[token + m]);
            unroll<N>([&](auto n) { Isa::store(line + n * V, Isa::mul(sum[m][n], scale)); });
            emit<Isa, N * V>(y, token + m, panel * panel_rows + lane, w.rows, line);
        });
    }

    // body(m, n, p) for every token, vector and plane.
    template <class Body>
    [[gnu::always_inline]] static void each(Body&& body) {
        unroll<M>([&](auto m) { unroll<N>([&](auto n) { unroll<P>([&](auto p) { body(m, n, p); }); }); });
    }

    // A function of its own, whose loop has the registers to itself: with the sums of `part` around it, GCC moves every
    // sum to another register and back in each block, and a tile of 8 tokens is a third slower.
    [[gnu::noinline, gnu::flatten]] static void dot_apart(
        const std::uint8_t* codes, std::int64_t blocks, const std::int8_t* values, std::int64_t stride, Ints (&dots)[M][N]
    ) {
        dot(codes, blocks, values, stride, dots);
    }

    // dots += Σ code · value over some blocks of a segment, exact.
    [[gnu::always_inline]] static void dot(
        const std::uint8_t* codes, std::int64_t blocks, const std::int8_t* values, std::int64_t stride, Ints (&dots)[M][N]
    ) {
        Ints acc[M][N][P];
        each([&](auto m, auto n, auto p) { acc[m][n][p] = p == 0 ? dots[m][n] : Isa::splat(0); });
        for (std::int64_t b = 0; b < blocks; ++b, codes += block_stride, values += 4 * fields) {
            if constexpr (Isa::direct_sums) {
                add_block(codes, values, stride, acc);
            } else {
                Ints part[M][N][P];
                each([&](auto m, auto n, auto p) { part[m][n][p] = Isa::template block<Width>(acc[m][n][p]); });
                add_block(codes, values, stride, part);
                each([&](auto m, auto n, auto p) {
                    acc[m][n][p] = Isa::template end_block<Width>(acc[m][n][p], part[m][n][p]);
                });
            }
        }
        unroll<M>([&](auto m) {
            unroll<N>([&](auto n) {
                Ints all = acc[m][n][0];
                unroll<P - 1>([&](auto p) {
                    all = Isa::add(all, Isa::template shift_down<Width * (p + 1)>(acc[m][n][p + 1]));
                });
                dots[m][n] = all;
            });
        });
    }

    // sums += Σ code · value over one block.
    [[gnu::always_inline]] static void add_block(
        const std::uint8_t* codes, const std::int8_t* values, std::int64_t stride, Ints (&sums)[M][N][P]
    ) {
        typename Isa::Bytes held[N];
        if constexpr (!unpacked)
            unroll<N>([&](auto n) {
                __builtin_prefetch(codes + n * 4 * V + ahead);
                held[n] = Isa::load_bytes(codes + n * 4 * V);
            });
        unroll<fields>([&](auto f) {
            constexpr int plane = f % P, shift = Width * (f - plane);
            typename Isa::Bytes code[N];
            unroll<N>([&](auto n) {
                if constexpr (unpacked)
                    code[n] = Isa::load_bytes(codes + f * block_bytes + n * 4 * V);
                else
                    code[n] = Isa::template field<shift, mask << Width * plane>(held[n]);
            });
            unroll<M>([&](auto m) {
                const auto quad = Isa::broadcast(values + m * stride + 4 * f);
                unroll<N>([&](auto n) {
                    sums[m][n][plane] = Isa::template dot<Width>(sums[m][n][plane], code[n], quad);
                });
            });
        });
    }

    // sum += scale · (dots - (zero - centre) · total). Products and sums are rounded one by one, never fused: so every
    // instruction set, with or without such an instruction, comes to the same bits.
    [[gnu::always_inline]] static void fold(
        const Matrix& w, std::int64_t at, const std::int32_t (&total)[M], const Ints (&dots)[M][N], Floats (&sum)[M][N]
    ) {
        const Floats centre = Isa::splat(static_cast<float>(w.centre));
        unroll<N>([&](auto n) {
            const Floats scale = load_reals<Isa>(w.scales, w.real, at + n * V);
            const Floats zero = w.zeros ? load_reals<Isa>(w.zeros, w.real, at + n * V) : Isa::splat(w.zero);
            const Floats off = Isa::sub(zero, centre);
            unroll<M>([&](auto m) {
                const Floats shifted = Isa::mul(off, Isa::splat(static_cast<float>(total[m])));
                const Floats exact = Isa::sub(Isa::to_float(dots[m][n]), shifted);
                sum[m][n] = Isa::add(sum[m][n], Isa::mul(scale, exact));
            });
        });
    }
};

template <class Isa, int Width, int M>
struct FloatTile {
    static constexpr int V = Isa::lanes, N = Isa::shape(8, M).vectors, mask = (1 << Width) - 1;
    // Blocks that are summed before they join the rest: 256 columns. In one go, 70,000 equal products would lose 3e-4
    // to rounding, and so they lose less than 1e-5.
    static constexpr std::int64_t stretch = 256 / (32 / Width);
    using Ints = typename Isa::Ints;
    using Floats = typename Isa::Floats;

    static void run(
        const Matrix& w, const std::uint8_t* codes, const FloatTokens& x, const Output& y, std::int64_t panel, std::int64_t token
    ) {
        for (int lane = 0; lane < panel_rows; lane += N * V) part(w, codes + 4 * lane, x, y, panel, lane, token);
    }

    [[gnu::flatten]] static void part(
        const Matrix& w, const std::uint8_t* codes, const FloatTokens& x, const Output& y, std::int64_t panel, int lane,
        std::int64_t token
    ) {
        const std::int64_t segments = w.segments.count(), blocks = w.blocks();
        const float* values = x.values + token * x.stride;
        Floats sum[M][N];
        unroll<M>([&](auto m) { unroll<N>([&](auto n) { sum[m][n] = Isa::splat(0.0f); }); });
        for (std::int64_t s = 0; s < segments; ++s) {
            const std::int64_t at = (panel * segments + s) * panel_rows + lane;
            Floats zero[N], dots[M][N];
            unroll<N>([&](auto n) {
                zero[n] = w.zeros ? load_reals<Isa>(w.zeros, w.real, at + n * V) : Isa::splat(w.zero);
            });
            for (std::int64_t left = blocks; left > 0; left -= stretch) {
                const std::int64_t count = left < stretch ? left : stretch;
                dot(codes, count, values, x.stride, zero, dots);
                unroll<N>([&](auto n) {
                    const Floats scale = load_reals<Isa>(w.scales, w.real, at + n * V);
                    unroll<M>([&](auto m) { sum[m][n] = Isa::fma(scale, dots[m][n], sum[m][n]); });
                });
                codes += count * block_bytes;
                values += count * (32 / Width);
            }
        }
        const std::int64_t row = panel * panel_rows + lane;
        unroll<M>([&](auto m) {
            alignas(64) float line[N * V];
            unroll<N>([&](auto n) { Isa::store(line + n * V, sum[m][n]); });
            emit<Isa, N * V>(y, token + m, row, w.rows, line);
        });
    }

    // dots = Σ (code - zero) · value over some blocks; the difference is exact, as in QTensor.dequantize.
    [[gnu::always_inline]] static void dot(
        const std::uint8_t* codes, std::int64_t blocks, const float* values, std::int64_t stride,
        const Floats (&zero)[N], Floats (&dots)[M][N]
    ) {
        unroll<M>([&](auto m) { unroll<N>([&](auto n) { dots[m][n] = Isa::splat(0.0f); }); });
        for (std::int64_t b = 0; b < blocks; ++b, codes += block_bytes, values += 32 / Width) {
            typename Isa::Bytes held[N];
            unroll<N>([&](auto n) { held[n] = Isa::load_bytes(codes + n * 4 * V); });
            unroll<32 / Width>([&](auto k) {  // column k of the block: field k / 4 of byte k % 4
                constexpr int bit = 8 * (k % 4) + Width * (k / 4);
                Floats weight[N];
                unroll<N>([&](auto n) {
                    const Ints code = Isa::template lane_field<bit, mask>(held[n]);
                    weight[n] = Isa::sub(Isa::to_float(code), zero[n]);
                });
                unroll<M>([&](auto m) {
                    const Floats value = Isa::splat(values[m * stride + k]);
                    unroll<N>([&](auto n) { dots[m][n] = Isa::fma(weight[n], value, dots[m][n]); });
                });
            });
        }
    }
};

}  // namespace
}  // namespace upq::cpu

// The tiles of one instruction set, put together to products of any size.

#pragma once

#include "kernels.hpp"
#include "lookups.hpp"
#include "steps.hpp"
#include "tile.hpp"
#include "tokens.hpp"
#include "training.hpp"

namespace upq::cpu {
namespace {

// Tokens that are multiplied with one panel after the other must stay in the second-level cache: 512 KiB of them, half of
// what current servers have at least.
inline constexpr std::int64_t cached_bytes = 512 << 10;

// Codes unpacked at a time: with the values of a tile they stay in the first-level cache, of 32 KiB or more.
inline constexpr std::int64_t stretch_bytes = 24 << 10;

// Memory of a thread for unpacked codes and what is carried from one stretch of them to the next.
struct Scratch {
    // The results of each go to a page of their own, and the first translation buffer has 64 entries: with 128 tokens at
    // a time 8192 rows of 2048 take 512 tokens at 239 GMAC/s, with 64 at 285.
    static constexpr std::int64_t tokens = 64;
    alignas(64) std::uint8_t codes[stretch_bytes];
    Carried carried[tokens];
};
static_assert(sizeof(Scratch) <= scratch_bytes);

// body(panel, its codes, tokens) for every panel, with as many tokens at a time as stay in the cache, at most `limit`.
template <class Isa, class Tokens, class Body>
void each_panel(const Matrix& w, const Tokens& x, Range panels, Range tokens, std::int64_t limit, Body&& body) {
    constexpr std::int64_t full = Isa::tile_tokens;
    const std::int64_t fit = cached_bytes / (x.stride * static_cast<std::int64_t>(sizeof(*x.values))) / full * full;
    const std::int64_t most = fit < full ? full : fit < limit ? fit : limit, count = tokens.end - tokens.begin;
    const std::int64_t parts = (count + most - 1) / most, step = ((count + parts - 1) / parts + full - 1) / full * full;
    const std::int64_t panel_bytes = w.segments.count() * w.blocks() * block_bytes;
    for (std::int64_t first = tokens.begin; first < tokens.end; first += step)
        for (std::int64_t panel = panels.begin; panel < panels.end; ++panel)
            body(panel, w.codes + panel * panel_bytes, {first, first + step < tokens.end ? first + step : tokens.end});
}

// body(token, how many) for every tile.
template <class Isa, class Body>
[[gnu::always_inline]] inline void each_tile(Range tokens, Body&& body) {
    constexpr std::int64_t full = Isa::tile_tokens;
    for (std::int64_t token = tokens.begin; token < tokens.end; token += full)
        body(token, tokens.end - token < full ? tokens.end - token : full);
}

template <class Isa, int Width>
void int_product(const Matrix& w, const IntTokens& x, const Output& y, Range panels, Range tokens, Scratch& scratch) {
    using Run = decltype(&IntTile<Isa, Width, 1>::run);
    constexpr bool packs = Width < 8;
    Run packed[Isa::tile_tokens], unpacked[Isa::tile_tokens];  // by number of tokens, from 1
    unroll<Isa::tile_tokens>([&](auto m) {
        packed[m] = IntTile<Isa, Width, m + 1>::run;
        unpacked[m] = IntTile<Isa, Width, m + 1, packs>::run;
    });
    const std::int64_t blocks = w.segments.count() * w.blocks();
    constexpr std::int64_t stretch = stretch_bytes / (block_bytes * 8 / Width);
    each_panel<Isa>(w, x, panels, tokens, Scratch::tokens, [&](std::int64_t panel, const std::uint8_t* codes, Range part) {
        const std::int64_t tiles = (part.end - part.begin) / Isa::tile_tokens;
        // Unpacking costs what the masks and shifts of one tile cost, and stores: it pays from the third tile on.
        if (!packs || tiles < 3 || !Isa::unpacking_pays())
            return each_tile<Isa>(part, [&](std::int64_t token, std::int64_t count) {
                packed[count - 1](w, codes, x, y, panel, token, {0, blocks}, nullptr);
            });
        for (std::int64_t b = 0; b < blocks; b += stretch) {
            const Range range{b, blocks < b + stretch ? blocks : b + stretch};
            unpack<Isa, Width>(codes + range.begin * block_bytes, range.end - range.begin, scratch.codes);
            // The next codes come from memory while these are multiplied.
            const std::uint8_t* next = codes + range.end * block_bytes;
            const std::int64_t lines = 2 * stretch / tiles + 1;
            each_tile<Isa>(part, [&](std::int64_t token, std::int64_t count) {
                for (std::int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
                Carried* carried = scratch.carried + (token - part.begin);
                unpacked[count - 1](w, scratch.codes, x, y, panel, token, range, carried);
            });
        }
    });
}

template <class Isa, int Width>
void float_product(const Matrix& w, const FloatTokens& x, const Output& y, Range panels, Range tokens) {
    using Run = decltype(&FloatTile<Isa, Width, 1>::run);
    Run runs[Isa::tile_tokens];
    unroll<Isa::tile_tokens>([&](auto m) { runs[m] = FloatTile<Isa, Width, m + 1>::run; });
    each_panel<Isa>(w, x, panels, tokens, tokens.end, [&](std::int64_t panel, const std::uint8_t* codes, Range part) {
        each_tile<Isa>(part, [&](std::int64_t token, std::int64_t count) {
            runs[count - 1](w, codes, x, y, panel, token);
        });
    });
}

template <class Isa>
void w2a8(const Matrix& w, const IntTokens& x, const Output& y, Range panels, Range tokens, std::uint8_t* memory) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(memory);
    if (w.width == 2) return int_product<Isa, 2>(w, x, y, panels, tokens, scratch);
    if (w.width == 4) return int_product<Isa, 4>(w, x, y, panels, tokens, scratch);
    int_product<Isa, 8>(w, x, y, panels, tokens, scratch);
}

template <class Isa>
void w2a16(const Matrix& w, const FloatTokens& x, const Output& y, Range panels, Range tokens, std::uint8_t*) {
    if (w.width == 2) return float_product<Isa, 2>(w, x, y, panels, tokens);
    if (w.width == 4) return float_product<Isa, 4>(w, x, y, panels, tokens);
    float_product<Isa, 8>(w, x, y, panels, tokens);
}

template <class Isa>
constexpr Kernels kernels_of(const char* name) {
    return {
        name,
        quantize<Isa>,
        widen_token<Isa>,
        w2a8<Isa>,
        w2a16<Isa>,
        Isa::lanes,
        book_table<Isa>,
        book_tables<Isa>,
        book_sum<Isa>,
        book_sums<Isa>,
        dense<Isa>,
        rms_norm<Isa>,
        gated<Isa>,
        attend<Isa>,
        fake_seq,
        seq_gradient,
        gjs,
    };
}

}  // namespace
}  // namespace upq::cpu

// The tiles of one instruction set, put together to products of any size.

#pragma once

#include "kernels.hpp"
#include "steps.hpp"
#include "tile.hpp"
#include "tokens.hpp"

namespace upq::cpu {
namespace {

// Tokens that are multiplied with one panel after the other must stay in the second-level cache: 256 KiB of them, a
// quarter of what current cores have at least.
inline constexpr std::int64_t cached_bytes = 256 << 10;

template <class Isa, template <class, int, int> class Tile, int Width>
void product(
    const Matrix& w, const typename Tile<Isa, Width, 1>::Tokens& x, const Output& y, Range panels, Range tokens
) {
    using Run = void (*)(const Matrix&, const typename Tile<Isa, Width, 1>::Tokens&, const Output&, std::int64_t, std::int64_t);
    constexpr std::int64_t full = Isa::tile_tokens;
    Run runs[full];  // by number of tokens, from 1
    unroll<static_cast<int>(full)>([&](auto m) { runs[m] = Tile<Isa, Width, m + 1>::run; });
    const std::int64_t fit = cached_bytes / (x.stride * static_cast<std::int64_t>(sizeof(*x.values))) / full * full;
    const std::int64_t step = fit > full ? fit : full;
    for (std::int64_t first = tokens.begin; first < tokens.end; first += step) {
        const std::int64_t end = first + step < tokens.end ? first + step : tokens.end;
        for (std::int64_t panel = panels.begin; panel < panels.end; ++panel)
            for (std::int64_t token = first; token < end; token += full)
                runs[(end - token < full ? end - token : full) - 1](w, x, y, panel, token);
    }
}

template <class Isa, template <class, int, int> class Tile>
void product_of_any_width(
    const Matrix& w, const typename Tile<Isa, 8, 1>::Tokens& x, const Output& y, Range panels, Range tokens
) {
    if (w.width == 2) return product<Isa, Tile, 2>(w, x, y, panels, tokens);
    if (w.width == 4) return product<Isa, Tile, 4>(w, x, y, panels, tokens);
    product<Isa, Tile, 8>(w, x, y, panels, tokens);
}

template <class Isa>
constexpr Kernels kernels_of(const char* name) {
    return {
        name,
        quantize<Isa>,
        widen_token<Isa>,
        product_of_any_width<Isa, IntTile>,
        product_of_any_width<Isa, FloatTile>,
        dense<Isa>,
        rms_norm<Isa>,
        gated<Isa>,
        attend<Isa>,
    };
}

}  // namespace
}  // namespace upq::cpu

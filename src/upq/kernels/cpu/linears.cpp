#include "linears.hpp"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "threads.hpp"

namespace upq::cpu {

namespace {

// Tokens are prepared in portions, so that a long text needs no more memory than 1024 of its tokens. By then a product
// has long been bound by arithmetic: reading the codes once more for each portion costs nothing.
constexpr std::int64_t portion = 1024;

// Rows of tokens a multiple of 4 KiB apart would all fall into the same few sets of the first-level cache.
constexpr std::int64_t skew = 64;

// Uninitialised, at the start of a cache line: with unpacked codes across two lines products were 6 % slower.
template <class T>
struct Array {
    static constexpr std::align_val_t line{64};
    struct Free {
        void operator()(T* data) const { ::operator delete(data, line); }
    };
    std::unique_ptr<T, Free> data;

    explicit Array(std::int64_t count)
        : data(static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), line))) {}
};

// The tokens of a call as matrices of one cut take them, with their memory.
template <class Tokens>
struct Prepared;

template <>
struct Prepared<IntTokens> {
    Array<std::int8_t> values;
    Array<std::int32_t> sums;
    Array<float> scales;
    IntTokens tokens;

    Prepared(std::int64_t count, const Segments& segments)
        : values(count * (segments.stride() + skew)),
          sums(count * segments.count()),
          scales(count),
          tokens{values.data.get(), sums.data.get(), scales.data.get(), segments.stride() + skew, segments.count()} {}
};

template <>
struct Prepared<FloatTokens> {
    Array<float> values;
    FloatTokens tokens;

    Prepared(std::int64_t count, const Segments& segments)
        : values(count * (segments.stride() + skew)), tokens{values.data.get(), segments.stride() + skew} {}
};

template <class Tokens>
struct Call {
    const Rows& x;
    std::span<const Product> products;
    int threads;
    void (*prepare)(const Rows&, const Segments&, std::int64_t, float*, const Tokens&);
    void (*product)(const Matrix&, const Tokens&, const Output&, Range, Range, std::uint8_t*);

    std::vector<Segments> cuts{};
    std::vector<Prepared<Tokens>> prepared{};

    void run() {
        std::int64_t panels = 0, work = 0;
        for (const Product& p : products) {
            const Matrix& w = p.matrix->view();
            panels += w.panels();
            work += w.rows * w.segments.columns * x.tokens;
            if (std::ranges::find(cuts, w.segments) != cuts.end()) continue;
            cuts.push_back(w.segments);
            prepared.emplace_back(x.tokens, w.segments);
        }
        const int useful = useful_threads(work, threads);
        prepare_tokens(static_cast<int>(std::min<std::int64_t>(useful, x.tokens)));
        const Array<std::uint8_t> scratch(useful * scratch_bytes);
        parallel(useful, [&](int thread, int count) {
            multiply(thread, count, panels, scratch.data.get() + thread * scratch_bytes);
        });
    }

    void prepare_tokens(int count) {
        const Array<float> scratch(count * x.columns);
        parallel(count, [&](int thread, int team) {
            const Range tokens = share(x.tokens, thread, team);
            for (std::size_t i = 0; i < cuts.size(); ++i)
                for (std::int64_t t = tokens.begin; t < tokens.end; ++t)
                    prepare(x, cuts[i], t, scratch.data.get() + thread * x.columns, prepared[i].tokens);
        });
    }

    // Threads share the panels of all matrices, in one stretch each so that each reads one stream; where there are
    // more threads than panels, they share the tokens as well.
    void multiply(int thread, int count, std::int64_t panels, std::uint8_t* scratch) const {
        constexpr std::int64_t tile = 8;  // tokens: the largest tile of any instruction set
        const auto across = static_cast<int>(std::min<std::int64_t>(count, panels));
        const int along = count / across;
        if (thread >= across * along) return;
        const Range mine = share(panels, thread % across, across), tokens = share(x.tokens, thread / across, along, tile);
        std::int64_t first = 0;
        for (const Product& p : products) {
            const Matrix& w = p.matrix->view();
            const Range part{std::max<std::int64_t>(mine.begin - first, 0), std::min(mine.end - first, w.panels())};
            first += w.panels();
            if (part.begin >= part.end || tokens.begin >= tokens.end) continue;
            const auto cut = static_cast<std::size_t>(std::ranges::find(cuts, w.segments) - cuts.begin());
            product(w, prepared[cut].tokens, p.output, part, tokens, scratch);
        }
    }
};

std::int64_t bytes_of(Real real) { return real == Real::f32 ? 4 : 2; }

}  // namespace

void linears(const Kernels& kernels, const Rows& x, std::span<const Product> products, Compute compute, int threads) {
    for (std::int64_t first = 0; first < x.tokens; first += portion) {
        const auto* data = static_cast<const std::uint8_t*>(x.data) + first * x.columns * bytes_of(x.real);
        const Rows part{data, x.real, std::min(portion, x.tokens - first), x.columns};
        std::vector<Product> to(products.begin(), products.end());
        for (Product& p : to) {
            auto* out = static_cast<std::uint8_t*>(p.output.data);
            p.output.data = out + first * p.matrix->view().rows * bytes_of(p.output.real);
        }
        if (compute == Compute::w2a8)
            Call<IntTokens>{part, to, threads, kernels.quantize, kernels.w2a8}.run();
        else
            Call<FloatTokens>{part, to, threads, kernels.widen, kernels.w2a16}.run();
    }
}

}  // namespace upq::cpu

#include "books.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "reals.hpp"
#include "threads.hpp"

namespace upq::cpu {

namespace {

// Tables that are made at a time, for all threads: they stay in the second-level cache.
constexpr std::int64_t tables_bytes = 1 << 20;

void write(const Output& y, std::int64_t at, float value) {
    if (y.real == Real::f32) {
        static_cast<float*>(y.data)[at] = value;
        return;
    }
    static_cast<std::uint16_t*>(y.data)[at] = y.real == Real::f16 ? narrow_f16(value) : narrow_bf16(value);
}

}  // namespace

PackedBooks::PackedBooks(const CanonicalBooks& source) {
    const std::int64_t vectors = source.columns / book_vector, values = source.books * book_rows * book_vector;
    codes_ = Pages::among_others(static_cast<std::size_t>(source.rows * vectors * source.books));
    values_ = Pages::among_others(static_cast<std::size_t>(values) * sizeof(float));
    scales_ = Pages::among_others(static_cast<std::size_t>(source.rows) * sizeof(float));
    auto* by_column = reinterpret_cast<float*>(values_.data());
    for (std::int64_t m = 0; m < source.books; ++m)
        for (std::int64_t k = 0; k < book_rows; ++k)
            for (std::int64_t v = 0; v < book_vector; ++v)
                by_column[(m * book_vector + v) * book_rows + k] = source.values[(m * book_rows + k) * book_vector + v];
    std::memcpy(scales_.data(), source.scales, scales_.bytes() ? static_cast<std::size_t>(source.rows) * sizeof(float) : 0);
    for (std::int64_t first = 0; first < vectors; first += book_stretch) {
        const std::int64_t count = std::min(book_stretch, vectors - first);
        const auto bytes = static_cast<std::size_t>(count * source.books);
        for (std::int64_t row = 0; row < source.rows; ++row)
            std::memcpy(
                codes_.data() + (first * source.rows + row * count) * source.books,
                source.codes + (row * vectors + first) * source.books, bytes
            );
    }
    view_ = {
        source.rows, vectors, source.books, codes_.data(), by_column, reinterpret_cast<const float*>(scales_.data())
    };
}

void book_linear(const Kernels& kernels, const Rows& x, const BookMatrix& w, const Output& y, int threads) {
    for (std::int64_t token = 0; token < x.tokens;) {
        const std::int64_t left = x.tokens - token, tile = left == 1 ? 1 : kernels.book_tile, count = std::min(left, tile);
        // Column after column, each of all tokens of the tile; those that are missing are zeros.
        std::vector<float> values(static_cast<std::size_t>(x.columns * tile)), sums(static_cast<std::size_t>(w.rows * tile));
        for (std::int64_t t = 0; t < count; ++t)
            for (std::int64_t i = 0; i < x.columns; ++i)
                values[static_cast<std::size_t>(i * tile + t)] = widen(x.data, x.real, (token + t) * x.columns + i);
        const std::int64_t table = w.books * book_rows * tile;  // floats of one vector
        const std::int64_t fit = std::max<std::int64_t>(1, tables_bytes / (table * 4 * book_stretch)) * book_stretch;
        std::vector<float> tables(static_cast<std::size_t>(table * std::min(fit, w.vectors)));
        const auto make = tile == 1 ? kernels.book_table : kernels.book_tables;
        const auto add = tile == 1 ? kernels.book_sum : kernels.book_sums;
        const int useful = useful_threads(w.rows * w.vectors * w.books * tile, threads);
        for (std::int64_t first = 0; first < w.vectors; first += fit) {
            const Range some{first, std::min(first + fit, w.vectors)};
            parallel(useful, [&](int thread, int team) {
                const Range mine = share(some.end - some.begin, thread, team);
                for (std::int64_t v = mine.begin; v < mine.end; ++v)
                    make(w, values.data() + (first + v) * book_vector * tile, tables.data() + v * table);
            });
            parallel(useful, [&](int thread, int team) {
                const Range rows = share(w.rows, thread, team, 4);
                for (std::int64_t v = some.begin; v < some.end; v += book_stretch)
                    add(w, {v, std::min(v + book_stretch, some.end)}, rows, tables.data() + (v - first) * table, sums.data());
            });
        }
        for (std::int64_t t = 0; t < count; ++t)
            for (std::int64_t row = 0; row < w.rows; ++row) {
                float value = sums[static_cast<std::size_t>(row * tile + t)] * w.scales[row];
                if (y.bias) value += widen(y.bias, y.bias_real, row);
                write(y, (token + t) * w.rows + row, value);
            }
        token += count;
    }
}

}  // namespace upq::cpu

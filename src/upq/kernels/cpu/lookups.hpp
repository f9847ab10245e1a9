// Tables of dot products, and sums of their entries: books.hpp says what for.

#pragma once

#include "kernels.hpp"
#include "tile.hpp"

namespace upq::cpu {
namespace {

// Entry k of book m: x · row k, for one token's vector x. Law: the same bits as in book_tables.
template <class Isa>
void book_table(const BookMatrix& w, const float* x, float* table) {
    constexpr int V = Isa::lanes;
    for (int m = 0; m < w.books; ++m) {
        const float* column = w.values + m * book_vector * book_rows;
        for (int k = 0; k < book_rows; k += V) {
            typename Isa::Floats sum = Isa::mul(Isa::splat(x[0]), Isa::load(column + k));
            for (int v = 1; v < book_vector; ++v) sum = Isa::fma(Isa::splat(x[v]), Isa::load(column + v * book_rows + k), sum);
            Isa::store(table + m * book_rows + k, sum);
        }
    }
}

// The same of Isa::lanes tokens side by side.
template <class Isa>
void book_tables(const BookMatrix& w, const float* x, float* tables) {
    constexpr int V = Isa::lanes;
    typename Isa::Floats tokens[book_vector];
    for (int v = 0; v < book_vector; ++v) tokens[v] = Isa::load(x + v * V);
    for (int m = 0; m < w.books; ++m) {
        const float* column = w.values + m * book_vector * book_rows;
        for (int k = 0; k < book_rows; ++k) {
            typename Isa::Floats sum = Isa::mul(tokens[0], Isa::splat(column[k]));
            for (int v = 1; v < book_vector; ++v) sum = Isa::fma(tokens[v], Isa::splat(column[v * book_rows + k]), sum);
            Isa::store(tables + (m * book_rows + k) * V, sum);
        }
    }
}

// sums[row] += the entries that the codes of some vectors choose. Four rows at a time: a sum waits for none of the others.
template <class Isa>
void book_sum(const BookMatrix& w, Range vectors, Range rows, const float* tables, float* sums) {
    const std::int64_t count = (vectors.end - vectors.begin) * w.books;  // codes of a row
    const std::uint8_t* codes = w.codes + vectors.begin * w.books * w.rows;
    std::int64_t row = rows.begin;
    for (; row + 4 <= rows.end; row += 4) {
        const std::uint8_t* c = codes + row * count;
        float a = 0, b = 0, d = 0, e = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            const float* table = tables + i * book_rows;
            a += table[c[i]];
            b += table[c[count + i]];
            d += table[c[2 * count + i]];
            e += table[c[3 * count + i]];
        }
        sums[row] += a;
        sums[row + 1] += b;
        sums[row + 2] += d;
        sums[row + 3] += e;
    }
    for (; row < rows.end; ++row) {
        float a = 0;
        for (std::int64_t i = 0; i < count; ++i) a += tables[i * book_rows + codes[row * count + i]];
        sums[row] += a;
    }
}

template <class Isa>
void book_sums(const BookMatrix& w, Range vectors, Range rows, const float* tables, float* sums) {
    constexpr int V = Isa::lanes;
    const std::int64_t count = (vectors.end - vectors.begin) * w.books;
    const std::uint8_t* codes = w.codes + vectors.begin * w.books * w.rows;
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
        const std::uint8_t* c = codes + row * count;
        typename Isa::Floats sum = Isa::splat(0.0f);
        for (std::int64_t i = 0; i < count; ++i) sum = Isa::add(sum, Isa::load(tables + (i * book_rows + c[i]) * V));
        Isa::store(sums + row * V, Isa::add(Isa::load(sums + row * V), sum));
    }
}

}  // namespace
}  // namespace upq::cpu

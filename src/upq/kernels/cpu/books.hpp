// Products with code books (upq/core/levels.py, Books): a table of dot products for each vector of a token, then a sum of
// its entries for each row. A row of I weights costs I/8 · M look-ups in the place of I multiply-adds.

#pragma once

#include <cstdint>

#include "kernels.hpp"
#include "memory.hpp"

namespace upq::cpu {

// A weight of code books in the canonical layout.
struct CanonicalBooks {
    std::int64_t rows, columns;
    int books;
    const std::uint8_t* codes;  // [rows][columns / 8][books]
    const float* values;        // [books][256][8]
    const float* scales;        // [rows]
};

// The same weight rearranged for products; owns its memory and needs the canonical one no longer.
class PackedBooks {
   public:
    explicit PackedBooks(const CanonicalBooks& source);  // throws std::bad_alloc

    const BookMatrix& view() const { return view_; }
    std::size_t bytes() const { return codes_.bytes() + values_.bytes() + scales_.bytes(); }

   private:
    Pages codes_, values_, scales_;
    BookMatrix view_;
};

// x · Ŵᵀ + bias, in float32 until it is written. An output depends on its token and its row alone, bit for bit. Throws
// std::bad_alloc.
void book_linear(const Kernels& kernels, const Rows& x, const BookMatrix& w, const Output& y, int threads);

}  // namespace upq::cpu

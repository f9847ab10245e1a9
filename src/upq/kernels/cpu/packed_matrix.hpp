#pragma once

#include <cstdint>

#include "layout.hpp"
#include "memory.hpp"

namespace upq::cpu {

// A weight in the canonical file layout (upq/kernels/reference.py): each row a little-endian bit stream of codes.
struct Canonical {
    std::int64_t rows, columns, groups;
    int bits;                   // 2 to 8
    const std::uint8_t* codes;  // [rows][ceil(columns · bits / 8)]
    const void* scales;         // [rows][groups]
    const void* zeros;          // [rows][groups] or null: `zero` holds for all
    float zero;
    Real real;  // type of scales and zeros
};

// The same weight rearranged for products; owns its memory and needs the canonical one no longer.
class PackedMatrix {
   public:
    PackedMatrix(const Canonical& source, int threads);  // throws std::bad_alloc

    const Matrix& view() const { return view_; }
    std::size_t bytes() const { return codes_.bytes() + scales_.bytes() + zeros_.bytes(); }

   private:
    Pages codes_, scales_, zeros_;
    Matrix view_;
};

}  // namespace upq::cpu

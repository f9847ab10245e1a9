// A weight as it lies in memory while it is multiplied, and the values it is multiplied with.
//
// 32 rows make a panel. A block of 128 bytes holds 4 bytes of each row of a panel, row after row, so a vector of n
// 32-bit lanes works on n rows at once and never has to add across lanes. Inside a lane, for codes of `width` bits:
//
//     byte j, bits [f·width, (f+1)·width)   =   the code of column  4·f + j  of the block
//
// so 4 consecutive columns (a quad, what one int8 dot product takes) lie at the same bits of the 4 bytes, and one shift
// and one mask bring them out. A block is 16 columns of 2-bit codes, 8 of 4-bit or 4 of 8-bit ones; 3 bits are held as
// 4, and 5 to 7 as 8. The blocks of a panel follow one another and the panels too: a product reads one linear stream,
// which memory delivers 2.2 times as fast as two streams 8 KiB apart (31 against 14 GB/s).
//
// Scales, and zero points where groups have their own, lie in an array of their own: [panel][segment][32].

#pragma once

#include <cstdint>

namespace upq::cpu {

enum class Real : int { f32, f16, bf16 };  // how a real number is stored

inline constexpr int panel_rows = 32;
inline constexpr int block_bytes = 4 * panel_rows;

// Products of a segment are summed in int32, in planes shifted by up to 6 bits: 255 · 127 · 32768 is below 2^30, and so
// is 64 · 3 · 127 · 32768 / 4 columns of a plane.
inline constexpr std::int64_t longest_segment = 32768;

struct Range {
    std::int64_t begin, end;
};

// The columns of a row, cut into groups that share a scale, and a long group into segments whose sum fits 32 bits.
// Each segment is padded to whole blocks; padding has code 0 and activation 0.
struct Segments {
    std::int64_t columns;    // I
    std::int64_t group;      // S, columns that share a scale; I = G · S
    std::int64_t per_group;  // segments of a group: 1 unless it is longer than longest_segment
    std::int64_t padded;     // columns of a segment in memory

    // always_inline: these are compiled for several instruction sets, and the linker must not choose one for all
    [[gnu::always_inline]] std::int64_t count() const { return columns / group * per_group; }
    [[gnu::always_inline]] std::int64_t stride() const { return count() * padded; }

    // The columns that segment s holds.
    [[gnu::always_inline]] Range span(std::int64_t s) const {
        const std::int64_t start = s % per_group * padded, base = s / per_group * group;
        return {base + start, base + (start + padded < group ? start + padded : group)};
    }

    bool operator==(const Segments&) const = default;
};

// A weight as a product reads it; PackedMatrix owns the memory.
struct Matrix {
    std::int64_t rows;  // O
    Segments segments;
    int width;   // bits that a code takes in memory: 2, 4 or 8
    int centre;  // 2^(bits-1): sums are of (code - centre), so that they stay small and exact in float32
    const std::uint8_t* codes;
    const void* scales;
    const void* zeros;  // as the scales, or null: `zero` holds for all groups
    float zero;
    Real real;  // type of scales and zeros

    [[gnu::always_inline]] std::int64_t panels() const { return (rows + panel_rows - 1) / panel_rows; }
    [[gnu::always_inline]] std::int64_t blocks() const { return segments.padded * width / 32; }  // of a segment
};

// A weight that stayed dense: (O, I), contiguous.
struct Dense {
    std::int64_t rows, columns;
    const void* data;
    Real real;
};

// A row of a code book stands for so many columns side by side, and a book has so many rows.
inline constexpr std::int64_t book_vector = 8, book_rows = 256;

// Vectors of columns whose codes lie together, row after row: their tables, for one token, stay in the first-level cache.
inline constexpr std::int64_t book_stretch = 8;

// A weight of code books as a product reads it; PackedBooks (books.hpp) owns the memory.
struct BookMatrix {
    std::int64_t rows, vectors;  // O, I / 8
    int books;                   // M
    const std::uint8_t* codes;   // [stretch][rows][vector of the stretch][books]
    const float* values;         // [books][8][256]
    const float* scales;         // [rows]
};

// Keys of this many positions lie together, feature by feature: a vector holds one feature of several positions, and
// their scores need no sum across lanes.
inline constexpr int key_block = 16;

// How keys and values are cached: float32, or int8 with a scale for each position.
enum class Stored : int { f32, int8 };

// What a decoder has cached for one key-value head of one text: blocks of key_block positions, which may lie anywhere.
// In each, keys [dim][key_block] and values [key_block][dim]; behind either, where they are int8, a float32 scale for
// each position.
struct Cached {
    const std::uint8_t* const* blocks;
    std::int64_t keys, values;  // bytes from the start of a block to this head's
    std::int64_t dim;
    Stored stored;

    // Bytes of the keys, or of the values, of a head in one block.
    [[gnu::always_inline]] static std::int64_t bytes(std::int64_t dim, Stored stored) {
        return key_block * (stored == Stored::f32 ? 4 * dim : dim + 4);
    }
};

// The tokens of a call: (M, I), contiguous.
struct Rows {
    const void* data;
    Real real;
    std::int64_t tokens, columns;
};

// Tokens in int8: x ≈ value · scale, with values padded as `Segments` says. A token with NaN or infinity has scale NaN.
struct IntTokens {
    std::int8_t* values;  // [M][stride]
    std::int32_t* sums;   // [M][segments]: Σ of the values, which takes the zero points along
    float* scales;        // [M]
    std::int64_t stride, segments;
};

// Tokens in float32, padded in the same way.
struct FloatTokens {
    float* values;  // [M][stride]
    std::int64_t stride;
};

// Where the products go: (M, O), contiguous.
struct Output {
    void* data;
    Real real;
    const void* bias;  // (O,) or null
    Real bias_real;
};

}  // namespace upq::cpu

#include "packed_matrix.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>

#include "threads.hpp"

namespace upq::cpu {

namespace {

static_assert(std::endian::native == std::endian::little, "codes are packed and unpacked as little-endian words");

int width_of(int bits) { return bits == 2 ? 2 : bits <= 4 ? 4 : 8; }

Segments cut(const Canonical& source) {
    const std::int64_t group = source.columns / source.groups, block = 32 / width_of(source.bits);
    const std::int64_t per_group = (group + longest_segment - 1) / longest_segment;
    const std::int64_t even = (group + per_group - 1) / per_group;
    return {source.columns, group, per_group, (even + block - 1) / block * block};
}

// One row of the bit stream as one code a byte.
void unpack(const std::uint8_t* bytes, int bits, std::int64_t columns, std::uint8_t* codes) {
    const std::int64_t count = (columns * bits + 7) / 8;
    const int mask = (1 << bits) - 1;
    std::int64_t k = 0;
    if (bits == 2) {  // the common case, four codes at a time: 4 times as fast as the loop below
        for (; k + 4 <= columns; k += 4) {
            const std::uint32_t b = bytes[k / 4], spread = (b | b << 6 | b << 12 | b << 18) & 0x03030303u;
            std::memcpy(codes + k, &spread, 4);
        }
    }
    for (; k < columns; ++k) {
        const std::int64_t bit = k * bits, first = bit / 8;
        const int next = first + 1 < count ? bytes[first + 1] : 0;  // a code may cross into the next byte
        codes[k] = static_cast<std::uint8_t>((bytes[first] | next << 8) >> bit % 8 & mask);
    }
}

// Codes, one a byte and padded, into the blocks of a panel; `lane` is where this row's bytes of a block lie.
template <int Width>
void interleave(const std::uint8_t* codes, std::int64_t padded_columns, std::uint8_t* lane) {
    constexpr int columns = 32 / Width;  // of a block
    for (std::int64_t k = 0; k < padded_columns; k += columns, lane += block_bytes) {
        std::uint32_t word = 0;
        for (int f = 0; f < 8 / Width; ++f) {
            std::uint32_t quad;
            std::memcpy(&quad, codes + k + 4 * f, 4);
            word |= quad << Width * f;
        }
        std::memcpy(lane, &word, 4);
    }
}

// [rows][groups] to [panel][segment][32]; the segments of a group have the same value.
template <class Bits>
void spread(const void* source, const Canonical& shape, const Segments& segments, Range panels, std::uint8_t* out) {
    const auto* from = static_cast<const Bits*>(source);
    auto* to = reinterpret_cast<Bits*>(out);
    const std::int64_t count = segments.count();
    for (std::int64_t row = panels.begin * panel_rows; row < std::min(shape.rows, panels.end * panel_rows); ++row) {
        Bits* lane = to + row / panel_rows * count * panel_rows + row % panel_rows;
        for (std::int64_t s = 0; s < count; ++s)
            lane[s * panel_rows] = from[row * shape.groups + s / segments.per_group];
    }
}

void fill_codes(const Canonical& source, const Matrix& view, Range panels, std::uint8_t* scratch, std::uint8_t* out) {
    const Segments& segments = view.segments;
    const std::int64_t stride = segments.stride(), row_bytes = (source.columns * source.bits + 7) / 8;
    std::uint8_t *plain = scratch, *padded = scratch + source.columns;
    const auto pack = view.width == 2 ? interleave<2> : view.width == 4 ? interleave<4> : interleave<8>;
    for (std::int64_t row = panels.begin * panel_rows; row < std::min(source.rows, panels.end * panel_rows); ++row) {
        unpack(source.codes + row * row_bytes, source.bits, source.columns, plain);
        for (std::int64_t s = 0; s < segments.count(); ++s) {
            const Range span = segments.span(s);
            std::memcpy(padded + s * segments.padded, plain + span.begin, static_cast<std::size_t>(span.end - span.begin));
        }
        std::uint8_t* panel = out + row / panel_rows * panel_rows * stride * view.width / 8;
        pack(padded, stride, panel + row % panel_rows * 4);
    }
}

}  // namespace

PackedMatrix::PackedMatrix(const Canonical& source, int threads) {
    const Segments segments = cut(source);
    const int width = width_of(source.bits);
    view_ = {source.rows, segments, width, 1 << (source.bits - 1), nullptr, nullptr, nullptr, source.zero, source.real};
    const std::int64_t held_rows = view_.panels() * panel_rows, stride = segments.stride();
    const std::int64_t real_bytes = source.real == Real::f32 ? 4 : 2;
    codes_ = Pages::among_others(static_cast<std::size_t>(held_rows * stride * width / 8));
    scales_ = Pages::among_others(static_cast<std::size_t>(held_rows * segments.count() * real_bytes));
    if (source.zeros) zeros_ = Pages::among_others(scales_.bytes());
    view_.codes = codes_.data();
    view_.scales = scales_.data();
    view_.zeros = zeros_.data();

    threads = static_cast<int>(std::min<std::int64_t>(threads, view_.panels()));
    const std::int64_t scratch_bytes = source.columns + stride;
    const auto scratch = std::make_unique<std::uint8_t[]>(static_cast<std::size_t>(threads * scratch_bytes));
    parallel(threads, [&](int thread, int count) {
        const Range panels = share(view_.panels(), thread, count);
        fill_codes(source, view_, panels, scratch.get() + thread * scratch_bytes, codes_.data());
        const auto fill = source.real == Real::f32 ? spread<std::uint32_t> : spread<std::uint16_t>;
        fill(source.scales, source, segments, panels, scales_.data());
        if (source.zeros) fill(source.zeros, source, segments, panels, zeros_.data());
    });
}

}  // namespace upq::cpu

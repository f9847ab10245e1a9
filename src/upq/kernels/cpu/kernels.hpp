// The functions of an instruction set: one table each, all made from the same templates (table.hpp).

#pragma once

#include "layout.hpp"

namespace upq::cpu {

// Memory that a product wants of each thread.
inline constexpr std::int64_t scratch_bytes = 64 << 10;

enum class Activation : int { silu, gelu_tanh };

struct Kernels {
    const char* name;

    // Token `token` of `x`, int8 or float32, into its place in `out`; `scratch` takes x.columns floats.
    void (*quantize)(const Rows& x, const Segments& segments, std::int64_t token, float* scratch, const IntTokens& out);
    void (*widen)(const Rows& x, const Segments& segments, std::int64_t token, float* scratch, const FloatTokens& out);

    // The products of some tokens with the rows of some panels; `scratch` is this thread's own, scratch_bytes
    // at the start of a cache line.
    void (*w2a8)(const Matrix& w, const IntTokens& x, const Output& y, Range panels, Range tokens, std::uint8_t* scratch);
    void (*w2a16)(const Matrix& w, const FloatTokens& x, const Output& y, Range panels, Range tokens, std::uint8_t* scratch);

    // Products with code books (lookups.hpp): of one token, and of book_tile tokens side by side.
    int book_tile;
    void (*book_table)(const BookMatrix& w, const float* x, float* table);
    void (*book_tables)(const BookMatrix& w, const float* x, float* tables);
    void (*book_sum)(const BookMatrix& w, Range vectors, Range rows, const float* tables, float* sums);
    void (*book_sums)(const BookMatrix& w, Range vectors, Range rows, const float* tables, float* sums);

    // What a decoder does between its products, in float32 (steps.hpp).
    void (*dense)(const Dense& w, const float* x, std::int64_t tokens, Range rows, float* y);
    void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t n, float* y);
    void (*gated)(Activation activation, const float* gate, const float* up, std::int64_t n, float* out);
    void (*attend)(
        const Cached& cache, const float* queries, std::int64_t count, Range seen, float scaling, float* scores, float* out
    );

    // What a training does between its products (training.hpp).
    void (*fake_seq)(const float* w, const float* scale, Range groups, std::int64_t size, float n, float* out);
    void (*seq_gradient)(
        const float* grad, const float* w, const float* scale, Range groups, std::int64_t size, float n, float bound,
        float factor, float* d_w, float* d_delta
    );
    void (*gjs)(const Rows& student, const Rows& teacher, Range tokens, float beta, float* value, float* grad);
};

// Each defined in the source file of its name, where the compiler could build it.
extern const Kernels avx512vnni, avxvnni, avx2, neon, portable;

}  // namespace upq::cpu

// A whole decoder-only transformer with its key-value cache: one call a token, nothing of Python in between.

#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <variant>
#include <vector>

#include "kernels.hpp"
#include "linears.hpp"
#include "packed_matrix.hpp"

namespace upq::cpu {

struct Linear {
    std::variant<const PackedMatrix*, Dense> weight;
    std::vector<float> bias;  // empty for none
};

struct Norm {
    std::vector<float> weight;
    float eps;
};

struct Block {
    Norm before_attention, before_mlp;
    std::optional<Norm> of_queries, of_keys;  // over each head (Qwen3)
    Linear q, k, v, o, gate, up, down;
    bool rotary;          // False in SmolLM3's layers without positions
    std::int64_t window;  // keys that a query sees at most; 0 for all
};

// Rows of the embedding: dense, or codes in the canonical layout with one scale a row.
struct Table {
    std::variant<Canonical, Dense> rows;
};

struct Shape {
    std::int64_t hidden, heads, kv_heads, head_dim, vocabulary;
    float scaling;                   // of q·k
    std::vector<float> frequencies;  // of the rotary positions, head_dim / 2
    float rotary_scaling;            // of cosine and sine (YaRN)
};

class Decoder {
   public:
    Decoder(Shape shape, Table embedding, std::vector<Block> blocks, Norm norm, Linear head);

    std::int64_t length() const { return length_; }

    // Forget all positions from `length` on.
    void truncate(std::int64_t length);

    // Append tokens; the logits that follow the last one, [vocabulary]. Throws std::bad_alloc before anything changes.
    void forward(
        const Kernels& kernels, std::span<const std::int32_t> ids, Compute compute, int threads, float* logits
    );

   private:
    struct Scratch;

    void reserve(std::int64_t positions);
    void chunk(const Kernels&, std::span<const std::int32_t> ids, Compute, int threads, Scratch&);
    void attention(const Kernels&, std::size_t layer, std::int64_t tokens, Compute, int threads, Scratch&);
    void mlp(const Kernels&, const Block&, std::int64_t tokens, Compute, int threads, Scratch&);
    void place(const Kernels&, const Block&, std::size_t layer, std::int64_t tokens, Scratch&);

    float* keys(std::size_t layer, std::int64_t head, std::int64_t position);
    float* values(std::size_t layer, std::int64_t head, std::int64_t position);

    Shape shape_;
    Table embedding_;
    std::vector<Block> blocks_;
    Norm norm_;
    Linear head_;
    std::int64_t length_ = 0, capacity_ = 0;
    std::vector<float> cache_;  // [layer][keys, values][head][capacity][head_dim]
};

}  // namespace upq::cpu

// A whole decoder-only transformer of Llama's kind with its key-value cache: one call a token, without Python.
//
// The caller keeps alive what it points to: upq/kernels/decoder.py.

#pragma once

#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "kernels.hpp"
#include "linears.hpp"
#include "memory.hpp"
#include "packed_matrix.hpp"

namespace upq::cpu {

struct Linear {
    std::variant<const PackedMatrix*, Dense> weight;
    const float* bias;  // or null

    std::int64_t rows() const;
};

struct Norm {
    const float* weight;  // null: there is no such norm
    float eps;
};

struct Block {
    Norm before_attention, before_mlp;
    Norm of_queries, of_keys;  // over each head (Qwen3)
    Linear q, k, v, o, gate, up, down;
    bool rotary;          // false in SmolLM3's layers without positions
    std::int64_t window;  // positions that a query sees at most, its own among them; 0 for all
};

// Rows of the embedding: dense, or codes in the canonical layout.
using Table = std::variant<Canonical, Dense>;

struct Dimensions {
    std::int64_t hidden, mlp, heads, kv_heads, head_dim;
    float scaling;             // of q·k
    const float* frequencies;  // of the rotary positions, [head_dim / 2]
    float rotary_scaling;      // of their cosines and sines (YaRN)
};

// Logits depend on the tokens alone: the portions they came in and the number of threads change no bit.
class Decoder {
   public:
    Decoder(const Dimensions& dimensions, const Table& embedding, std::vector<Block> blocks, const Norm& norm, const Linear& head);

    std::int64_t length() const { return length_; }  // positions in the cache

    // Drop all positions from `length` on.
    void truncate(std::int64_t length);

    // Append tokens; the logits that follow the last one, [vocabulary]. Throws std::bad_alloc: a part of the tokens may
    // have been appended by then, as length() says.
    void forward(const Kernels& kernels, std::span<const std::int32_t> ids, Compute compute, int threads, float* logits);

   private:
    struct Run;

    void reserve(std::int64_t positions);
    float* keys(std::size_t layer, std::int64_t head) const;
    float* values(std::size_t layer, std::int64_t head) const;

    Dimensions dimensions_;
    Table embedding_;
    std::vector<Block> blocks_;
    Norm norm_;
    Linear head_;
    std::int64_t length_ = 0, capacity_ = 0;  // capacity: whole blocks of keys
    Pages cache_;                             // [layer][keys, values][head][capacity · head_dim], see Cached
};

}  // namespace upq::cpu

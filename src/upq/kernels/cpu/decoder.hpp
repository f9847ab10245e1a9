// A whole decoder-only transformer with the key-value caches of its texts: one call a step, without Python. What its
// blocks have is data: norms, fused or separate linears, factors, windows, tables of positions, an MLP or experts.
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

// An RMS norm over each `size` values of a row.
struct Norm {
    const float* weight;  // null: there is no such norm
    float eps;
    std::int64_t size;
};

struct Mlp {
    std::vector<Linear> gate_up;  // two, or one whose rows are the gate's and then those of up
    Linear down;

    std::int64_t width() const;
};

struct Experts {
    Dense router;
    std::vector<Mlp> experts;
    std::int64_t chosen;  // experts of a token: those with the largest share of the router's softmax
    bool normalised;      // the shares of the chosen sum to one
};

struct Block {
    Norm before_attention, after_attention, before_mlp, after_mlp;
    Norm of_queries, of_keys;  // over a head each (Qwen3), or over all (OLMo 2)
    std::vector<Linear> qkv;   // three, or one whose rows are those of q, then k, then v
    Linear o;
    std::variant<Mlp, Experts> mlp;
    Activation activation;
    float scaling;        // of q·k
    std::int64_t rope;    // number of its table; -1 in SmolLM3's layers without positions
    std::int64_t window;  // positions that a query sees at most, its own among them; 0 for all
    float residual;       // of what is added to the hidden states (Granite)
};

// Rotary positions: of a head's first 2 · pairs values, i and i + pairs turn together.
struct Rope {
    const float* frequencies;  // [pairs]
    std::int64_t pairs;
    float scaling;  // of the cosines and sines (YaRN)
};

// Rows of the embedding: dense, or codes in the canonical layout.
using Table = std::variant<Canonical, Dense>;

struct Dimensions {
    std::int64_t hidden, heads, kv_heads, head_dim;
    float embedding_scale;
    std::vector<Rope> ropes;
};

// Tokens that a text goes on with.
struct Portion {
    std::int32_t text;
    std::span<const std::int32_t> ids;
};

// Logits depend on the tokens of their text alone: the portions these came in, the texts beside it and the number of
// threads change no bit.
class Decoder {
   public:
    Decoder(
        const Dimensions& dimensions, const Table& embedding, std::vector<Block> blocks, const Norm& norm, const Linear& head,
        Stored stored
    );
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    // The number of a new text, the lowest that is free.
    std::int32_t open();
    // The text and what it has in the cache are gone.
    void close(std::int32_t text);

    std::int64_t length(std::int32_t text) const { return at(text).length; }  // positions in the cache

    // Drop all positions of a text from `length` on.
    void truncate(std::int32_t text, std::int64_t length);

    // Append tokens to different texts; for each the logits that follow its last one, [portions][vocabulary]. Throws
    // std::bad_alloc; then no token has been appended.
    void forward(const Kernels& kernels, std::span<const Portion> portions, Compute compute, int threads, float* logits);

    std::int64_t cached_bytes() const;  // of the cache, in use or free

   private:
    struct Run;

    // Block b of a text's cache holds the positions from b · key_block on: [layer][keys, values][head], see Cached.
    struct Text {
        bool open = false;
        std::int64_t length = 0;
        std::vector<std::uint8_t*> blocks;
    };

    const Text& at(std::int32_t text) const { return texts_[static_cast<std::size_t>(text)]; }
    void reserve(Text& text, std::int64_t positions);
    void shorten(Text& text, std::int64_t length);
    std::int64_t block_bytes() const;
    Cached cached(std::int32_t text, std::size_t layer, std::int64_t head) const;

    Dimensions dimensions_;
    Table embedding_;
    std::vector<Block> blocks_;
    Norm norm_;
    Linear head_;
    Stored stored_;
    std::vector<Text> texts_;
    std::vector<Pages> memory_;         // in which all blocks of the cache lie
    std::vector<std::uint8_t*> free_;   // blocks of no text
};

}  // namespace upq::cpu

#include "decoder.hpp"

#include <algorithm>
#include <cmath>

#include "reals.hpp"
#include "threads.hpp"

namespace upq::cpu {

namespace {

// Tokens of a prompt that go through a block together: enough for the widest register tiles, and their activations
// stay in the second-level cache.
constexpr std::int64_t chunk_tokens = 128;

struct Target {
    const Linear* linear;
    float* y;
};

std::int64_t rows_of(const Linear& linear) {
    const auto* packed = std::get_if<const PackedMatrix*>(&linear.weight);
    return packed ? (*packed)->view().rows : std::get<Dense>(linear.weight).rows;
}

// Products of one x with linears that read it.
void products(
    const Kernels& kernels, const float* x, std::int64_t tokens, std::int64_t columns,
    std::initializer_list<Target> targets, Compute compute, int threads
) {
    std::vector<Product> packed;
    for (const auto& [linear, y] : targets) {
        const float* bias = linear->bias.empty() ? nullptr : linear->bias.data();
        if (const auto* matrix = std::get_if<const PackedMatrix*>(&linear->weight)) {
            packed.push_back({*matrix, {y, Real::f32, bias, Real::f32}});
            continue;
        }
        const Dense& w = std::get<Dense>(linear->weight);
        parallel(threads, [&](int thread, int team) {
            kernels.dense(w, x, tokens, share(w.rows, thread, team), y);
        });
        if (bias)
            for (std::int64_t t = 0; t < tokens; ++t)
                for (std::int64_t r = 0; r < w.rows; ++r) y[t * w.rows + r] += bias[r];
    }
    if (!packed.empty()) linears(kernels, {x, Real::f32, tokens, columns}, packed, compute, threads);
}

void look_up(const Table& table, std::int64_t id, std::int64_t columns, float* out) {
    if (const auto* dense = std::get_if<Dense>(&table.rows)) {
        for (std::int64_t i = 0; i < columns; ++i) out[i] = widen(dense->data, dense->real, id * columns + i);
        return;
    }
    const auto& codes = std::get<Canonical>(table.rows);
    const std::int64_t row_bytes = (columns * codes.bits + 7) / 8, group = columns / codes.groups;
    const std::uint8_t* row = codes.codes + id * row_bytes;
    for (std::int64_t i = 0; i < columns; ++i) {
        const std::int64_t bit = i * codes.bits, at = bit / 8;
        const unsigned pair = row[at] | (at + 1 < row_bytes ? row[at + 1] << 8 : 0);
        const unsigned code = pair >> bit % 8 & ((1u << codes.bits) - 1);
        const std::int64_t g = id * codes.groups + i / group;
        const float zero = codes.zeros ? widen(codes.zeros, codes.real, g) : codes.zero;
        out[i] = (static_cast<float>(code) - zero) * widen(codes.scales, codes.real, g);
    }
}

// (a, b) of every pair (i, i + dim/2) turned by the position's angles.
void rotate(float* head, const float* cosines, const float* sines, std::int64_t dim) {
    const std::int64_t half = dim / 2;
    for (std::int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cosines[i] - b * sines[i];
        head[half + i] = b * cosines[i] + a * sines[i];
    }
}

}  // namespace

struct Decoder::Scratch {
    std::vector<float> x, normed, q, k, v, attended, gate, up, added, cosines, sines;

    Scratch(const Shape& s, std::int64_t mlp, std::int64_t tokens)
        : x(size(tokens * s.hidden)),
          normed(size(tokens * s.hidden)),
          q(size(tokens * s.heads * s.head_dim)),
          k(size(tokens * s.kv_heads * s.head_dim)),
          v(k.size()),
          attended(q.size()),
          gate(size(tokens * mlp)),
          up(gate.size()),
          added(x.size()),
          cosines(size(tokens * s.head_dim / 2)),
          sines(cosines.size()) {}

    static std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }
};

Decoder::Decoder(Shape shape, Table embedding, std::vector<Block> blocks, Norm norm, Linear head)
    : shape_(std::move(shape)),
      embedding_(embedding),
      blocks_(std::move(blocks)),
      norm_(std::move(norm)),
      head_(std::move(head)) {}

void Decoder::truncate(std::int64_t length) { length_ = std::clamp<std::int64_t>(length, 0, length_); }

void Decoder::forward(
    const Kernels& kernels, std::span<const std::int32_t> ids, Compute compute, int threads, float* logits
) {
    const auto tokens = static_cast<std::int64_t>(ids.size());
    reserve(length_ + tokens);
    Scratch scratch(shape_, blocks_.empty() ? 0 : rows_of(blocks_[0].gate), std::min(tokens, chunk_tokens));
    std::int64_t last = 0;
    for (std::int64_t at = 0; at < tokens; at += chunk_tokens) {
        const std::int64_t count = std::min(tokens - at, chunk_tokens);
        chunk(kernels, ids.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(count)), compute, threads, scratch);
        last = count - 1;
    }
    kernels.rms_norm(
        scratch.x.data() + last * shape_.hidden, norm_.weight.data(), norm_.eps, shape_.hidden, scratch.normed.data()
    );
    products(kernels, scratch.normed.data(), 1, shape_.hidden, {{&head_, logits}}, compute, threads);
}

void Decoder::chunk(
    const Kernels& kernels, std::span<const std::int32_t> ids, Compute compute, int threads, Scratch& s
) {
    const auto tokens = static_cast<std::int64_t>(ids.size()), half = shape_.head_dim / 2;
    for (std::int64_t t = 0; t < tokens; ++t) {
        look_up(embedding_, ids[static_cast<std::size_t>(t)], shape_.hidden, s.x.data() + t * shape_.hidden);
        for (std::int64_t i = 0; i < half; ++i) {
            const float angle = static_cast<float>(length_ + t) * shape_.frequencies[static_cast<std::size_t>(i)];
            s.cosines[static_cast<std::size_t>(t * half + i)] = std::cos(angle) * shape_.rotary_scaling;
            s.sines[static_cast<std::size_t>(t * half + i)] = std::sin(angle) * shape_.rotary_scaling;
        }
    }
    for (std::size_t layer = 0; layer < blocks_.size(); ++layer) {
        attention(kernels, layer, tokens, compute, threads, s);
        mlp(kernels, blocks_[layer], tokens, compute, threads, s);
    }
    length_ += tokens;
}

void Decoder::attention(
    const Kernels& kernels, std::size_t layer, std::int64_t tokens, Compute compute, int threads, Scratch& s
) {
    const Block& block = blocks_[layer];
    const std::int64_t hidden = shape_.hidden, heads = shape_.heads, dim = shape_.head_dim;
    const std::int64_t shared = heads / shape_.kv_heads;  // query heads that read one key head
    for (std::int64_t t = 0; t < tokens; ++t)
        kernels.rms_norm(
            s.x.data() + t * hidden, block.before_attention.weight.data(), block.before_attention.eps, hidden,
            s.normed.data() + t * hidden
        );
    products(
        kernels, s.normed.data(), tokens, hidden, {{&block.q, s.q.data()}, {&block.k, s.k.data()}, {&block.v, s.v.data()}},
        compute, threads
    );
    place(kernels, block, layer, tokens, s);
    parallel(threads, [&](int thread, int team) {
        std::vector<float> scores(static_cast<std::size_t>(length_ + tokens));
        const Range mine = share(tokens * heads, thread, team);
        for (std::int64_t i = mine.begin; i < mine.end; ++i) {
            const std::int64_t position = length_ + i / heads, head = i % heads / shared;
            const std::int64_t begin = block.window ? std::max<std::int64_t>(0, position - block.window + 1) : 0;
            kernels.attend(
                s.q.data() + i * dim, keys(layer, head, begin), values(layer, head, begin), position - begin + 1, dim,
                shape_.scaling, scores.data(), s.attended.data() + i * dim
            );
        }
    });
    products(kernels, s.attended.data(), tokens, heads * dim, {{&block.o, s.added.data()}}, compute, threads);
    for (std::int64_t i = 0; i < tokens * hidden; ++i) s.x[static_cast<std::size_t>(i)] += s.added[static_cast<std::size_t>(i)];
}

// Norms and positions of the heads; keys and values to their places in the cache.
void Decoder::place(
    const Kernels& kernels, const Block& block, std::size_t layer, std::int64_t tokens, Scratch& s
) {
    const std::int64_t dim = shape_.head_dim, half = dim / 2;
    const auto prepare = [&](float* head, const std::optional<Norm>& norm, std::int64_t token) {
        if (norm) kernels.rms_norm(head, norm->weight.data(), norm->eps, dim, head);
        if (block.rotary) rotate(head, s.cosines.data() + token * half, s.sines.data() + token * half, dim);
    };
    for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t h = 0; h < shape_.heads; ++h) prepare(s.q.data() + (t * shape_.heads + h) * dim, block.of_queries, t);
        for (std::int64_t h = 0; h < shape_.kv_heads; ++h) {
            float* key = s.k.data() + (t * shape_.kv_heads + h) * dim;
            prepare(key, block.of_keys, t);
            std::copy_n(key, dim, keys(layer, h, length_ + t));
            std::copy_n(s.v.data() + (t * shape_.kv_heads + h) * dim, dim, values(layer, h, length_ + t));
        }
    }
}

void Decoder::mlp(
    const Kernels& kernels, const Block& block, std::int64_t tokens, Compute compute, int threads, Scratch& s
) {
    const std::int64_t hidden = shape_.hidden, width = rows_of(block.gate);
    for (std::int64_t t = 0; t < tokens; ++t)
        kernels.rms_norm(
            s.x.data() + t * hidden, block.before_mlp.weight.data(), block.before_mlp.eps, hidden,
            s.normed.data() + t * hidden
        );
    products(
        kernels, s.normed.data(), tokens, hidden, {{&block.gate, s.gate.data()}, {&block.up, s.up.data()}}, compute, threads
    );
    kernels.gated(s.gate.data(), s.up.data(), tokens * width);
    products(kernels, s.gate.data(), tokens, width, {{&block.down, s.added.data()}}, compute, threads);
    for (std::int64_t i = 0; i < tokens * hidden; ++i) s.x[static_cast<std::size_t>(i)] += s.added[static_cast<std::size_t>(i)];
}

void Decoder::reserve(std::int64_t positions) {
    if (positions <= capacity_) return;
    const std::int64_t wanted = std::max(positions, 2 * capacity_), dim = shape_.head_dim;
    const auto arrays = static_cast<std::int64_t>(blocks_.size()) * 2 * shape_.kv_heads;
    std::vector<float> larger(static_cast<std::size_t>(arrays * wanted * dim));
    for (std::int64_t i = 0; i < arrays; ++i)
        std::copy_n(cache_.data() + i * capacity_ * dim, length_ * dim, larger.data() + i * wanted * dim);
    cache_ = std::move(larger);
    capacity_ = wanted;
}

float* Decoder::keys(std::size_t layer, std::int64_t head, std::int64_t position) {
    const std::int64_t array = static_cast<std::int64_t>(layer) * 2 * shape_.kv_heads + head;
    return cache_.data() + (array * capacity_ + position) * shape_.head_dim;
}

float* Decoder::values(std::size_t layer, std::int64_t head, std::int64_t position) {
    return keys(layer, shape_.kv_heads + head, position);
}

}  // namespace upq::cpu

#include "decoder.hpp"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>

#include "reals.hpp"
#include "threads.hpp"

namespace upq::cpu {

namespace {

// Tokens of a prompt that go through a block together: the widest register tiles are full, and what lies between two
// products stays in the second-level cache.
constexpr std::int64_t chunk_tokens = 128;

struct Target {
    const Linear& linear;
    float* y;
};

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

std::int64_t up_to_blocks(std::int64_t positions) { return (positions + key_block - 1) / key_block * key_block; }

// body(token) for every token; fewer than 8 for each thread are not worth waking it.
template <class Body>
void for_tokens(std::int64_t tokens, int threads, const Body& body) {
    parallel(static_cast<int>(std::min<std::int64_t>(threads, (tokens + 7) / 8)), [&](int thread, int team) {
        const Range mine = share(tokens, thread, team);
        for (std::int64_t t = mine.begin; t < mine.end; ++t) body(t);
    });
}

void dense_product(
    const Kernels& kernels, const Dense& w, const float* bias, const float* x, std::int64_t tokens, int threads, float* y
) {
    parallel(useful_threads(w.rows * w.columns * tokens, threads), [&](int thread, int team) {
        kernels.dense(w, x, tokens, share(w.rows, thread, team), y);
    });
    if (!bias) return;
    for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t r = 0; r < w.rows; ++r) y[t * w.rows + r] += bias[r];
}

void look_up(const Dense& table, std::int64_t id, std::int64_t columns, float* out) {
    for (std::int64_t i = 0; i < columns; ++i) out[i] = widen(table.data, table.real, id * columns + i);
}

void look_up(const Canonical& table, std::int64_t id, std::int64_t columns, float* out) {
    const std::int64_t row_bytes = (columns * table.bits + 7) / 8, group = columns / table.groups;
    const std::uint8_t* row = table.codes + id * row_bytes;
    for (std::int64_t i = 0; i < columns; ++i) {
        const std::int64_t bit = i * table.bits, at = bit / 8;
        const int next = at + 1 < row_bytes ? row[at + 1] : 0;  // a code may cross into the next byte
        const int code = (row[at] | next << 8) >> bit % 8 & ((1 << table.bits) - 1);
        const std::int64_t g = id * table.groups + i / group;
        const float zero = table.zeros ? widen(table.zeros, table.real, g) : table.zero;
        out[i] = (static_cast<float>(code) - zero) * widen(table.scales, table.real, g);
    }
}

// The pairs (i, i + dim/2) of a head, turned by the angles of a position.
void rotate(float* head, const float* cosines, const float* sines, std::int64_t dim) {
    const std::int64_t half = dim / 2;
    for (std::int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cosines[i] - b * sines[i];
        head[half + i] = b * cosines[i] + a * sines[i];
    }
}

void add_to(std::vector<float>& x, const std::vector<float>& y, std::int64_t n) {
    for (std::size_t i = 0; i < size(n); ++i) x[i] += y[i];
}

}  // namespace

std::int64_t Linear::rows() const {
    const auto* packed = std::get_if<const PackedMatrix*>(&weight);
    return packed ? (*packed)->view().rows : std::get<Dense>(weight).rows;
}

// One call of forward(): how it computes, and what it computes on.
struct Decoder::Run {
    Decoder& self;
    const Kernels& kernels;
    Compute compute;
    int threads;
    const Dimensions& dims = self.dimensions_;

    // Of up to chunk_tokens tokens. `scores` has a row for every query of a key-value head and thread.
    std::vector<float> x, normed, q, k, v, attended, gate, up, added, cosines, sines, scores;

    Run(Decoder& decoder, const Kernels& with, Compute how, int team, std::int64_t tokens)
        : self(decoder), kernels(with), compute(how), threads(team) {
        const std::int64_t count = std::min(tokens, chunk_tokens), positions = decoder.length_ + tokens;
        for (auto* rows : {&x, &normed, &added}) rows->resize(size(count * dims.hidden));
        for (auto* rows : {&q, &attended}) rows->resize(size(count * dims.heads * dims.head_dim));
        for (auto* rows : {&k, &v}) rows->resize(size(count * dims.kv_heads * dims.head_dim));
        for (auto* rows : {&gate, &up}) rows->resize(size(count * dims.mlp));
        for (auto* rows : {&cosines, &sines}) rows->resize(size(count * dims.head_dim / 2));
        scores.resize(size(team * scores_of_a_thread(positions)));
    }

    std::int64_t scores_of_a_thread(std::int64_t positions) const {
        return dims.heads / dims.kv_heads * (positions + 2 * key_block);
    }

    // A portion of the tokens through all blocks, and into the cache.
    void chunk(std::span<const std::int32_t> ids) {
        const auto tokens = static_cast<std::int64_t>(ids.size());
        for_tokens(tokens, threads, [&](std::int64_t t) {
            const std::int64_t id = ids[size(t)];
            std::visit([&](const auto& table) { look_up(table, id, dims.hidden, &x[size(t * dims.hidden)]); }, self.embedding_);
            angles(self.length_ + t, t);
        });
        for (std::size_t layer = 0; layer < self.blocks_.size(); ++layer) {
            attention(self.blocks_[layer], layer, tokens);
            mlp(self.blocks_[layer], tokens);
        }
        self.length_ += tokens;
    }

    void head(std::int64_t token, float* logits) {
        norm(self.norm_, &x[size(token * dims.hidden)], &normed[0]);
        products(&normed[0], 1, dims.hidden, {{self.head_, logits}});
    }

   private:
    void angles(std::int64_t position, std::int64_t token) {
        const std::int64_t half = dims.head_dim / 2;
        for (std::int64_t i = 0; i < half; ++i) {
            const float angle = static_cast<float>(position) * dims.frequencies[i];
            cosines[size(token * half + i)] = std::cos(angle) * dims.rotary_scaling;
            sines[size(token * half + i)] = std::sin(angle) * dims.rotary_scaling;
        }
    }

    void attention(const Block& block, std::size_t layer, std::int64_t tokens) {
        norms(block.before_attention, tokens);
        products(&normed[0], tokens, dims.hidden, {{block.q, &q[0]}, {block.k, &k[0]}, {block.v, &v[0]}});
        for_tokens(tokens, threads, [&](std::int64_t t) { place(block, layer, t); });

        const std::int64_t dim = dims.head_dim, group = dims.heads / dims.kv_heads, all = self.length_ + tokens;
        const std::int64_t units = tokens * dims.kv_heads;
        const int useful = useful_threads(2 * tokens * dims.heads * dim * all, threads);
        parallel(useful, [&](int thread, int team) {
            const Range mine = share(units, thread, team);
            for (std::int64_t i = mine.begin; i < mine.end; ++i) {
                const std::int64_t position = self.length_ + i / dims.kv_heads, head = i % dims.kv_heads;
                const std::int64_t begin = block.window ? std::max<std::int64_t>(0, position - block.window + 1) : 0;
                kernels.attend(
                    {self.keys(layer, head), self.values(layer, head), dim}, &q[size(i * group * dim)], group,
                    {begin, position + 1}, dims.scaling, &scores[size(thread * scores_of_a_thread(all))],
                    &attended[size(i * group * dim)]
                );
            }
        });
        products(&attended[0], tokens, dims.heads * dim, {{block.o, &added[0]}});
        add_to(x, added, tokens * dims.hidden);
    }

    // Norms and positions of a token's heads; its keys and values to their places in the cache.
    void place(const Block& block, std::size_t layer, std::int64_t token) {
        const std::int64_t dim = dims.head_dim, half = dim / 2, position = self.length_ + token;
        const auto prepare = [&](float* head, const Norm& of_heads) {
            if (of_heads.weight) kernels.rms_norm(head, of_heads.weight, of_heads.eps, dim, head);
            if (block.rotary) rotate(head, &cosines[size(token * half)], &sines[size(token * half)], dim);
        };
        for (std::int64_t h = 0; h < dims.heads; ++h) prepare(&q[size((token * dims.heads + h) * dim)], block.of_queries);
        for (std::int64_t h = 0; h < dims.kv_heads; ++h) {
            const std::size_t at = size((token * dims.kv_heads + h) * dim);
            prepare(&k[at], block.of_keys);
            float* column = self.keys(layer, h) + position / key_block * key_block * dim + position % key_block;
            for (std::int64_t d = 0; d < dim; ++d) column[d * key_block] = k[at + size(d)];
            std::copy_n(&v[at], dim, self.values(layer, h) + position * dim);
        }
    }

    void mlp(const Block& block, std::int64_t tokens) {
        norms(block.before_mlp, tokens);
        products(&normed[0], tokens, dims.hidden, {{block.gate, &gate[0]}, {block.up, &up[0]}});
        for_tokens(tokens, threads, [&](std::int64_t t) {
            kernels.gated(&gate[size(t * dims.mlp)], &up[size(t * dims.mlp)], dims.mlp);
        });
        products(&gate[0], tokens, dims.mlp, {{block.down, &added[0]}});
        add_to(x, added, tokens * dims.hidden);
    }

    void norm(const Norm& n, const float* from, float* to) const { kernels.rms_norm(from, n.weight, n.eps, dims.hidden, to); }

    void norms(const Norm& n, std::int64_t tokens) {
        for_tokens(tokens, threads, [&](std::int64_t t) { norm(n, &x[size(t * dims.hidden)], &normed[size(t * dims.hidden)]); });
    }

    // Products of the same rows with linears that read them; the packed ones as one call.
    void products(const float* rows, std::int64_t tokens, std::int64_t columns, std::initializer_list<Target> targets) const {
        std::vector<Product> packed;
        for (const auto& [linear, y] : targets) {
            if (const auto* matrix = std::get_if<const PackedMatrix*>(&linear.weight))
                packed.push_back({*matrix, {y, Real::f32, linear.bias, Real::f32}});
            else
                dense_product(kernels, std::get<Dense>(linear.weight), linear.bias, rows, tokens, threads, y);
        }
        if (!packed.empty()) linears(kernels, {rows, Real::f32, tokens, columns}, packed, compute, threads);
    }
};

Decoder::Decoder(
    const Dimensions& dimensions, const Table& embedding, std::vector<Block> blocks, const Norm& norm, const Linear& head
)
    : dimensions_(dimensions), embedding_(embedding), blocks_(std::move(blocks)), norm_(norm), head_(head) {}

void Decoder::truncate(std::int64_t length) { length_ = std::clamp<std::int64_t>(length, 0, length_); }

void Decoder::forward(
    const Kernels& kernels, std::span<const std::int32_t> ids, Compute compute, int threads, float* logits
) {
    const auto tokens = static_cast<std::int64_t>(ids.size());
    if (tokens == 0) return;
    reserve(length_ + tokens);
    Run run(*this, kernels, compute, threads, tokens);
    for (std::int64_t at = 0; at < tokens; at += chunk_tokens)
        run.chunk(ids.subspan(size(at), size(std::min(tokens - at, chunk_tokens))));
    run.head((tokens - 1) % chunk_tokens, logits);
}

void Decoder::reserve(std::int64_t positions) {
    if (positions <= capacity_) return;
    const std::int64_t wanted = up_to_blocks(std::max(positions, 2 * capacity_)), dim = dimensions_.head_dim;
    const std::int64_t arrays = static_cast<std::int64_t>(blocks_.size()) * 2 * dimensions_.kv_heads;
    Pages larger(size(arrays * wanted * dim) * sizeof(float));
    const auto *from = reinterpret_cast<const float*>(cache_.data());
    auto *to = reinterpret_cast<float*>(larger.data());
    for (std::int64_t i = 0; i < arrays && length_ > 0; ++i)
        std::copy_n(from + i * capacity_ * dim, up_to_blocks(length_) * dim, to + i * wanted * dim);
    cache_ = std::move(larger);
    capacity_ = wanted;
}

float* Decoder::keys(std::size_t layer, std::int64_t head) const {
    const std::int64_t array = static_cast<std::int64_t>(layer) * 2 * dimensions_.kv_heads + head;
    return reinterpret_cast<float*>(cache_.data()) + array * capacity_ * dimensions_.head_dim;
}

float* Decoder::values(std::size_t layer, std::int64_t head) const { return keys(layer, dimensions_.kv_heads + head); }

}  // namespace upq::cpu

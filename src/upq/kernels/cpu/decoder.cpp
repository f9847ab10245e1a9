#include "decoder.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "reals.hpp"
#include "threads.hpp"

namespace upq::cpu {

namespace {

// Tokens of a prompt that go through a block together: the widest register tiles are full, and what lies between two
// products stays in the second-level cache.
constexpr std::int64_t chunk_tokens = 128;

struct Target {
    const Linear* linear;
    float* y;
};

// Rows of equal length, one for each token, in a buffer where other values may lie between them.
struct Strided {
    float* data;
    std::int64_t stride;

    float* operator[](std::int64_t token) const { return data + token * stride; }
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

// The pairs (i, i + pairs) of a head, turned by the angles of a position.
void rotate(float* head, const float* cosines, const float* sines, std::int64_t pairs) {
    for (std::int64_t i = 0; i < pairs; ++i) {
        const float a = head[i], b = head[pairs + i];
        head[i] = a * cosines[i] - b * sines[i];
        head[pairs + i] = b * cosines[i] + a * sines[i];
    }
}

// x += factor · y
void add_to(float* x, const float* y, float factor, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) x[i] += factor * y[i];
}

void softmax(float* row, std::int64_t n) {
    const float peak = *std::max_element(row, row + n);
    float sum = 0.0f;
    for (std::int64_t i = 0; i < n; ++i) sum += row[i] = std::exp(row[i] - peak);
    for (std::int64_t i = 0; i < n; ++i) row[i] /= sum;
}

// An expert of a token, and its factor.
struct Share {
    std::int64_t expert;
    float share;
};

// The experts with the largest shares, of equal ones the first, by number.
void choose(const float* shares, std::int64_t experts, bool normalised, std::vector<std::int64_t>& order, std::span<Share> out) {
    order.resize(size(experts));
    std::iota(order.begin(), order.end(), 0);
    const auto chosen = order.begin() + static_cast<std::ptrdiff_t>(out.size());
    std::partial_sort(order.begin(), chosen, order.end(), [&](std::int64_t a, std::int64_t b) {
        return shares[a] != shares[b] ? shares[a] > shares[b] : a < b;
    });
    float sum = 0.0f;
    for (auto i = order.begin(); i != chosen; ++i) sum += shares[*i];
    std::sort(order.begin(), chosen);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = {order[i], normalised ? shares[order[i]] / sum : shares[order[i]]};
}

std::int64_t width_of(const Block& block) {
    if (const auto* mlp = std::get_if<Mlp>(&block.mlp)) return mlp->width();
    return std::get<Experts>(block.mlp).experts.front().width();
}

}  // namespace

std::int64_t Linear::rows() const {
    const auto* packed = std::get_if<const PackedMatrix*>(&weight);
    return packed ? (*packed)->view().rows : std::get<Dense>(weight).rows;
}

std::int64_t Mlp::width() const { return gate_up.front().rows() / (gate_up.size() == 1 ? 2 : 1); }

// One call of forward(): how it computes, and what it computes on.
struct Decoder::Run {
    Decoder& self;
    const Kernels& kernels;
    Compute compute;
    int threads;
    const Dimensions& dims = self.dimensions_;

    // Of up to chunk_tokens tokens. `scores` has a row for every query of a key-value head and thread.
    std::vector<float> x, normed, qkv, attended, gate_up, inner, added, scores;
    std::vector<std::vector<float>> cosines, sines;  // of each table of positions
    // Where there are experts: what the router says, the tokens of one expert, and what it makes of them.
    std::vector<float> routed, gathered, made;
    std::vector<Share> shares;
    std::vector<std::int64_t> order, members;

    Run(Decoder& decoder, const Kernels& with, Compute how, int team, std::int64_t tokens)
        : self(decoder), kernels(with), compute(how), threads(team), cosines(dims.ropes.size()), sines(dims.ropes.size()) {
        const std::int64_t count = std::min(tokens, chunk_tokens), positions = decoder.length_ + tokens;
        std::int64_t width = 0, chosen = 0, experts = 0;
        for (const Block& block : self.blocks_) {
            const auto* choice = std::get_if<Experts>(&block.mlp);
            // the chosen experts of a single token are computed together
            width = std::max(width, width_of(block) * (choice ? std::max<std::int64_t>(count, choice->chosen) : count));
            if (!choice) continue;
            chosen = std::max(chosen, choice->chosen);
            experts = std::max(experts, choice->router.rows);
        }
        for (auto* rows : {&x, &normed, &added}) rows->resize(size(count * dims.hidden));
        attended.resize(size(count * dims.heads * dims.head_dim));
        qkv.resize(size(count * (dims.heads + 2 * dims.kv_heads) * dims.head_dim));
        gate_up.resize(size(2 * width));
        inner.resize(size(width));
        for (std::size_t i = 0; i < dims.ropes.size(); ++i)
            for (auto* rows : {&cosines[i], &sines[i]}) rows->resize(size(count * dims.ropes[i].pairs));
        scores.resize(size(team * scores_of_a_thread(positions)));
        if (!chosen) return;
        routed.resize(size(count * experts));
        for (auto* rows : {&gathered, &made}) rows->resize(size(count * dims.hidden));
        shares.resize(size(count * chosen));
    }

    std::int64_t scores_of_a_thread(std::int64_t positions) const {
        return dims.heads / dims.kv_heads * (positions + 2 * key_block);
    }

    // A portion of the tokens through all blocks, and into the cache.
    void chunk(std::span<const std::int32_t> ids) {
        const auto tokens = static_cast<std::int64_t>(ids.size());
        for_tokens(tokens, threads, [&](std::int64_t t) {
            const std::int64_t id = ids[size(t)];
            float* row = &x[size(t * dims.hidden)];
            std::visit([&](const auto& table) { look_up(table, id, dims.hidden, row); }, self.embedding_);
            for (std::int64_t i = 0; i < dims.hidden; ++i) row[i] *= dims.embedding_scale;
            for (std::size_t i = 0; i < dims.ropes.size(); ++i) angles(i, self.length_ + t, t);
        });
        for (std::size_t layer = 0; layer < self.blocks_.size(); ++layer) {
            const Block& block = self.blocks_[layer];
            attention(block, layer, tokens);
            add(block.after_attention, block.residual, tokens);
            const float* rows = norms(block.before_mlp, tokens);
            if (const auto* mlp = std::get_if<Mlp>(&block.mlp))
                feed(*mlp, block.activation, rows, tokens, &added[0]);
            else
                feed(std::get<Experts>(block.mlp), block.activation, rows, tokens);
            add(block.after_mlp, block.residual, tokens);
        }
        self.length_ += tokens;
    }

    void head(std::int64_t token, float* logits) {
        norm(self.norm_, &x[size(token * dims.hidden)], &normed[0], dims.hidden);
        const Target target{&self.head_, logits};
        products(&normed[0], 1, dims.hidden, {&target, 1});
    }

   private:
    void angles(std::size_t table, std::int64_t position, std::int64_t token) {
        const Rope& rope = dims.ropes[table];
        for (std::int64_t i = 0; i < rope.pairs; ++i) {
            const float angle = static_cast<float>(position) * rope.frequencies[i];
            cosines[table][size(token * rope.pairs + i)] = std::cos(angle) * rope.scaling;
            sines[table][size(token * rope.pairs + i)] = std::sin(angle) * rope.scaling;
        }
    }

    void attention(const Block& block, std::size_t layer, std::int64_t tokens) {
        const std::int64_t dim = dims.head_dim, queries = dims.heads * dim, keys = dims.kv_heads * dim;
        const auto heads = split(block.qkv, norms(block.before_attention, tokens), tokens, queries, keys);
        const Strided q = heads[0], k = heads[1], v = heads[2];
        for_tokens(tokens, threads, [&](std::int64_t t) { place(block, layer, t, q[t], k[t], v[t]); });

        const std::int64_t group = dims.heads / dims.kv_heads, all = self.length_ + tokens;
        const std::int64_t units = tokens * dims.kv_heads;
        const int useful = useful_threads(2 * tokens * dims.heads * dim * all, threads);
        parallel(useful, [&](int thread, int team) {
            const Range mine = share(units, thread, team);
            for (std::int64_t i = mine.begin; i < mine.end; ++i) {
                const std::int64_t token = i / dims.kv_heads, head = i % dims.kv_heads, position = self.length_ + token;
                const std::int64_t begin = block.window ? std::max<std::int64_t>(0, position - block.window + 1) : 0;
                kernels.attend(
                    {self.keys(layer, head), self.values(layer, head), dim}, q[token] + head * group * dim, group,
                    {begin, position + 1}, block.scaling, &scores[size(thread * scores_of_a_thread(all))],
                    &attended[size(i * group * dim)]
                );
            }
        });
        const Target target{&block.o, &added[0]};
        products(&attended[0], tokens, queries, {&target, 1});
    }

    // Queries, keys and values of all tokens, in `qkv`: one after the other, or as rows of one linear.
    std::array<Strided, 3> split(
        const std::vector<Linear>& linears, const float* rows, std::int64_t tokens, std::int64_t queries, std::int64_t keys
    ) {
        float* data = &qkv[0];
        if (linears.size() == 1) {
            const Target target{&linears[0], data};
            products(rows, tokens, dims.hidden, {&target, 1});
            const std::int64_t stride = queries + 2 * keys;
            return {{{data, stride}, {data + queries, stride}, {data + queries + keys, stride}}};
        }
        float* const k = data + tokens * queries;
        float* const v = k + tokens * keys;
        const Target targets[] = {{&linears[0], data}, {&linears[1], k}, {&linears[2], v}};
        products(rows, tokens, dims.hidden, targets);
        return {{{data, queries}, {k, keys}, {v, keys}}};
    }

    // Norms and positions of a token's heads; its keys and values to their places in the cache.
    void place(const Block& block, std::size_t layer, std::int64_t token, float* q, float* k, const float* v) {
        const std::int64_t dim = dims.head_dim, position = self.length_ + token;
        norm(block.of_queries, q, q, dims.heads * dim);
        norm(block.of_keys, k, k, dims.kv_heads * dim);
        if (block.rope >= 0) {
            const auto table = static_cast<std::size_t>(block.rope);
            const std::int64_t pairs = dims.ropes[table].pairs;
            const float *cosine = &cosines[table][size(token * pairs)], *sine = &sines[table][size(token * pairs)];
            for (std::int64_t h = 0; h < dims.heads; ++h) rotate(q + h * dim, cosine, sine, pairs);
            for (std::int64_t h = 0; h < dims.kv_heads; ++h) rotate(k + h * dim, cosine, sine, pairs);
        }
        for (std::int64_t h = 0; h < dims.kv_heads; ++h) {
            float* column = self.keys(layer, h) + position / key_block * key_block * dim + position % key_block;
            for (std::int64_t d = 0; d < dim; ++d) column[d * key_block] = k[h * dim + d];
            std::copy_n(v + h * dim, dim, self.values(layer, h) + position * dim);
        }
    }

    // y = down(f(gate · x) · (up · x))
    void feed(const Mlp& mlp, Activation activation, const float* rows, std::int64_t tokens, float* y) {
        const std::int64_t width = mlp.width();
        const bool fused = mlp.gate_up.size() == 1;
        const Target targets[] = {{&mlp.gate_up.front(), &gate_up[0]}, {&mlp.gate_up.back(), &gate_up[size(tokens * width)]}};
        products(rows, tokens, dims.hidden, {targets, mlp.gate_up.size()});
        const Strided gate{&gate_up[0], fused ? 2 * width : width};
        const Strided up{&gate_up[size(fused ? width : tokens * width)], gate.stride};
        float* const to = fused ? &inner[0] : gate.data;  // in place where the gate's rows lie together
        for_tokens(tokens, threads, [&](std::int64_t t) { kernels.gated(activation, gate[t], up[t], width, to + t * width); });
        const Target down{&mlp.down, y};
        products(to, tokens, width, {&down, 1});
    }

    // The sum over each token's experts, in the order of their numbers, into `added`.
    void feed(const Experts& experts, Activation activation, const float* rows, std::int64_t tokens) {
        const std::int64_t count = experts.router.rows, chosen = experts.chosen, hidden = dims.hidden;
        dense_product(kernels, experts.router, nullptr, rows, tokens, threads, &routed[0]);
        for (std::int64_t t = 0; t < tokens; ++t) {
            float* row = &routed[size(t * count)];
            softmax(row, count);
            choose(row, count, experts.normalised, order, {&shares[size(t * chosen)], size(chosen)});
        }
        std::fill_n(added.begin(), tokens * hidden, 0.0f);
        if (tokens == 1) return feed_one(experts, activation, rows);
        for (std::int64_t e = 0; e < count; ++e) {
            members.clear();  // places in `shares`
            for (std::int64_t i = 0; i < tokens * chosen; ++i)
                if (shares[size(i)].expert == e) members.push_back(i);
            if (members.empty()) continue;
            const auto n = static_cast<std::int64_t>(members.size());
            for (std::int64_t i = 0; i < n; ++i)
                std::copy_n(rows + members[size(i)] / chosen * hidden, hidden, &gathered[size(i * hidden)]);
            feed(experts.experts[size(e)], activation, &gathered[0], n, &made[0]);
            for (std::int64_t i = 0; i < n; ++i) {
                const std::int64_t at = members[size(i)];
                add_to(&added[size(at / chosen * hidden)], &made[size(i * hidden)], shares[size(at)].share, hidden);
            }
        }
    }

    // The experts of one token: the products that read it are one call, which quantises it once.
    void feed_one(const Experts& experts, Activation activation, const float* row) {
        const std::int64_t width = experts.experts.front().width();
        std::vector<Target> targets;
        for (std::int64_t i = 0; i < experts.chosen; ++i) {
            const Mlp& mlp = experts.experts[size(shares[size(i)].expert)];
            float* const gate = &gate_up[size(2 * i * width)];
            targets.push_back({&mlp.gate_up.front(), gate});
            if (mlp.gate_up.size() > 1) targets.push_back({&mlp.gate_up.back(), gate + width});
        }
        products(row, 1, dims.hidden, targets);
        for (std::int64_t i = 0; i < experts.chosen; ++i) {
            const float* gate = &gate_up[size(2 * i * width)];
            kernels.gated(activation, gate, gate + width, width, &inner[size(i * width)]);
        }
        for (std::int64_t i = 0; i < experts.chosen; ++i) {
            const Target target{&experts.experts[size(shares[size(i)].expert)].down, &made[0]};
            products(&inner[size(i * width)], 1, width, {&target, 1});
            add_to(&added[0], &made[0], shares[size(i)].share, dims.hidden);
        }
    }

    // The norm of each n.size of `count` values; without a norm nothing.
    void norm(const Norm& n, const float* from, float* to, std::int64_t count) const {
        if (!n.weight) return;
        for (std::int64_t i = 0; i < count; i += n.size) kernels.rms_norm(from + i, n.weight, n.eps, n.size, to + i);
    }

    // The hidden states as a norm leaves them; without a norm themselves.
    const float* norms(const Norm& n, std::int64_t tokens) {
        if (!n.weight) return &x[0];
        for_tokens(tokens, threads, [&](std::int64_t t) {
            norm(n, &x[size(t * dims.hidden)], &normed[size(t * dims.hidden)], dims.hidden);
        });
        return &normed[0];
    }

    // `added`, normed where there is a norm, to the hidden states.
    void add(const Norm& n, float factor, std::int64_t tokens) {
        if (n.weight)
            for_tokens(tokens, threads, [&](std::int64_t t) {
                float* row = &added[size(t * dims.hidden)];
                norm(n, row, row, dims.hidden);
            });
        add_to(&x[0], &added[0], factor, tokens * dims.hidden);
    }

    // Products of the same rows with linears that read them; the packed ones as one call.
    void products(const float* rows, std::int64_t tokens, std::int64_t columns, std::span<const Target> targets) const {
        std::vector<Product> packed;
        for (const auto& [linear, y] : targets) {
            if (const auto* matrix = std::get_if<const PackedMatrix*>(&linear->weight))
                packed.push_back({*matrix, {y, Real::f32, linear->bias, Real::f32}});
            else
                dense_product(kernels, std::get<Dense>(linear->weight), linear->bias, rows, tokens, threads, y);
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

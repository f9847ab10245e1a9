#include "decoder.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
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

std::int64_t blocks_of(std::int64_t positions) { return (positions + key_block - 1) / key_block; }

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

// n values to int8, `step` apart, and their scale; zeros where they are all below 2^-120, as in tokens.hpp.
void quantize(const float* x, std::int64_t n, std::int64_t step, std::int8_t* codes, float* scale) {
    float peak = 0.0f;
    bool finite = true;
    for (std::int64_t i = 0; i < n; ++i) {
        peak = std::max(peak, std::abs(x[i]));
        finite &= std::isfinite(x[i]);
    }
    const bool held = finite && peak >= 0x1p-120f;
    *scale = held ? peak / 127.0f : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    const float inverse = held ? 127.0f / peak : 0.0f;
    constexpr float shift = 12582912.0f;  // rounds to the nearest integer
    for (std::int64_t i = 0; i < n; ++i)
        codes[i * step] = static_cast<std::int8_t>(held ? x[i] * inverse + shift - shift : 0.0f);
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

// A token on its way through the blocks.
struct Row {
    std::int32_t text, id;
    std::int64_t position;
    std::int64_t ends;  // number of the portion whose last token it is; or -1
};

// One call of forward(): how it computes, and what it computes on.
struct Decoder::Run {
    Decoder& self;
    const Kernels& kernels;
    Compute compute;
    int threads;
    std::int64_t longest;  // positions that a token sees at most
    const Dimensions& dims = self.dimensions_;
    std::span<const Row> rows{};  // of the chunk

    // Of up to chunk_tokens tokens. `scratch` is what the attention of a key-value head takes, for every thread.
    std::vector<float> x, normed, qkv, attended, gate_up, inner, added, scratch;
    std::vector<float> last;  // hidden states of the last token of each portion
    std::vector<std::vector<float>> cosines, sines;  // of each table of positions
    // Where there are experts: what the router says, the tokens of one expert, and what it makes of them.
    std::vector<float> routed, gathered, made;
    std::vector<Share> shares;
    std::vector<std::int64_t> order, members;

    Run(Decoder& decoder, const Kernels& with, Compute how, int team, std::int64_t tokens, std::int64_t portions, std::int64_t positions)
        : self(decoder), kernels(with), compute(how), threads(team), longest(positions), cosines(dims.ropes.size()), sines(dims.ropes.size()) {
        const std::int64_t count = std::min(tokens, chunk_tokens);
        std::int64_t width = 0, chosen = 0, experts = 0;
        for (const Block& block : self.blocks_) {
            const auto* choice = std::get_if<Experts>(&block.mlp);
            // the chosen experts of a single token are computed together
            width = std::max(width, width_of(block) * (choice ? std::max<std::int64_t>(count, choice->chosen) : count));
            if (!choice) continue;
            chosen = std::max(chosen, choice->chosen);
            experts = std::max(experts, choice->router.rows);
        }
        for (auto* each : {&x, &added}) each->resize(size(count * dims.hidden));
        normed.resize(size(std::max(count, portions) * dims.hidden));
        last.resize(size(portions * dims.hidden));
        attended.resize(size(count * dims.heads * dims.head_dim));
        qkv.resize(size(count * (dims.heads + 2 * dims.kv_heads) * dims.head_dim));
        gate_up.resize(size(2 * width));
        inner.resize(size(width));
        for (std::size_t i = 0; i < dims.ropes.size(); ++i)
            for (auto* each : {&cosines[i], &sines[i]}) each->resize(size(count * dims.ropes[i].pairs));
        scratch.resize(size(team * scratch_of_a_thread()));
        if (!chosen) return;
        routed.resize(size(count * experts));
        for (auto* each : {&gathered, &made}) each->resize(size(count * dims.hidden));
        shares.resize(size(count * chosen));
    }

    std::int64_t scratch_of_a_thread() const {
        return dims.heads / dims.kv_heads * (longest + 2 * key_block) + key_block * dims.head_dim;
    }

    // Some tokens through all blocks, and into the cache.
    void chunk(std::span<const Row> part) {
        rows = part;
        const auto tokens = static_cast<std::int64_t>(rows.size());
        for_tokens(tokens, threads, [&](std::int64_t t) {
            const auto [text, id, position, ends] = rows[size(t)];
            float* row = &x[size(t * dims.hidden)];
            std::visit([&](const auto& table) { look_up(table, id, dims.hidden, row); }, self.embedding_);
            for (std::int64_t i = 0; i < dims.hidden; ++i) row[i] *= dims.embedding_scale;
            for (std::size_t i = 0; i < dims.ropes.size(); ++i) angles(i, position, t);
        });
        for (std::size_t layer = 0; layer < self.blocks_.size(); ++layer) {
            const Block& block = self.blocks_[layer];
            attention(block, layer, tokens);
            add(block.after_attention, block.residual, tokens);
            const float* fed = norms(block.before_mlp, tokens);
            if (const auto* mlp = std::get_if<Mlp>(&block.mlp))
                feed(*mlp, block.activation, fed, tokens, &added[0]);
            else
                feed(std::get<Experts>(block.mlp), block.activation, fed, tokens);
            add(block.after_mlp, block.residual, tokens);
        }
        for (std::int64_t t = 0; t < tokens; ++t)
            if (const std::int64_t portion = rows[size(t)].ends; portion >= 0)
                std::copy_n(&x[size(t * dims.hidden)], dims.hidden, &last[size(portion * dims.hidden)]);
    }

    // The logits after each portion.
    void head(std::int64_t portions, float* logits) {
        for_tokens(portions, threads, [&](std::int64_t i) {
            norm(self.norm_, &last[size(i * dims.hidden)], &normed[size(i * dims.hidden)], dims.hidden);
        });
        const Target target{&self.head_, logits};
        products(&normed[0], portions, dims.hidden, {&target, 1});
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

        const std::int64_t group = dims.heads / dims.kv_heads, units = tokens * dims.kv_heads;
        std::int64_t seen = 0;
        for (const Row& row : rows) seen += row.position + 1;
        parallel(useful_threads(2 * seen * dims.heads * dim, threads), [&](int thread, int team) {
            const Range mine = share(units, thread, team);
            for (std::int64_t i = mine.begin; i < mine.end; ++i) {
                const std::int64_t token = i / dims.kv_heads, head = i % dims.kv_heads;
                const Row& row = rows[size(token)];
                const std::int64_t begin = block.window ? std::max<std::int64_t>(0, row.position - block.window + 1) : 0;
                kernels.attend(
                    self.cached(row.text, layer, head), q[token] + head * group * dim, group, {begin, row.position + 1},
                    block.scaling, &scratch[size(thread * scratch_of_a_thread())], &attended[size(i * group * dim)]
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
        const std::int64_t dim = dims.head_dim, position = rows[size(token)].position;
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
            const Cached cache = self.cached(rows[size(token)].text, layer, h);
            std::uint8_t* const held = const_cast<std::uint8_t*>(cache.blocks[position / key_block]);
            store(held + cache.keys, k + h * dim, position % key_block, 1, key_block);
            store(held + cache.values, v + h * dim, position % key_block, dim, 1);
        }
    }

    // One head's keys or values of a position; the first `at` places on, the others `step` apart.
    void store(std::uint8_t* held, const float* x, std::int64_t position, std::int64_t at, std::int64_t step) const {
        const std::int64_t dim = dims.head_dim;
        if (self.stored_ == Stored::f32) {
            float* const first = reinterpret_cast<float*>(held) + position * at;
            for (std::int64_t d = 0; d < dim; ++d) first[d * step] = x[d];
        } else {
            float* const scales = reinterpret_cast<float*>(held + key_block * dim);
            quantize(x, dim, step, reinterpret_cast<std::int8_t*>(held) + position * at, scales + position);
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
    const Dimensions& dimensions, const Table& embedding, std::vector<Block> blocks, const Norm& norm, const Linear& head,
    Stored stored
)
    : dimensions_(dimensions), embedding_(embedding), blocks_(std::move(blocks)), norm_(norm), head_(head), stored_(stored) {}

std::int32_t Decoder::open() {
    const auto found = std::find_if(texts_.begin(), texts_.end(), [](const Text& text) { return !text.open; });
    const auto number = static_cast<std::int32_t>(found - texts_.begin());
    if (found == texts_.end()) texts_.emplace_back();
    texts_[size(number)].open = true;
    return number;
}

void Decoder::close(std::int32_t text) {
    shorten(texts_[size(text)], 0);
    texts_[size(text)].open = false;
}

void Decoder::truncate(std::int32_t text, std::int64_t length) { shorten(texts_[size(text)], length); }

void Decoder::forward(
    const Kernels& kernels, std::span<const Portion> portions, Compute compute, int threads, float* logits
) {
    std::vector<Row> rows;
    std::int64_t longest = 0;
    for (std::size_t i = 0; i < portions.size(); ++i) {
        const auto [number, ids] = portions[i];
        Text& text = texts_[size(number)];
        const auto end = text.length + static_cast<std::int64_t>(ids.size());
        reserve(text, end);
        longest = std::max(longest, end);
        for (std::size_t t = 0; t < ids.size(); ++t) {
            const bool last = t + 1 == ids.size();
            rows.push_back({number, ids[t], text.length + static_cast<std::int64_t>(t), last ? static_cast<std::int64_t>(i) : -1});
        }
    }
    if (rows.empty()) return;
    const auto tokens = static_cast<std::int64_t>(rows.size()), count = static_cast<std::int64_t>(portions.size());
    Run run(*this, kernels, compute, threads, tokens, count, longest);
    for (std::int64_t first = 0; first < tokens; first += chunk_tokens)
        run.chunk(std::span<const Row>(rows).subspan(size(first), size(std::min(tokens - first, chunk_tokens))));
    run.head(count, logits);
    for (const auto& [number, ids] : portions) texts_[size(number)].length += static_cast<std::int64_t>(ids.size());
}

std::int64_t Decoder::cached_bytes() const {
    std::int64_t bytes = 0;
    for (const Pages& pages : memory_) bytes += static_cast<std::int64_t>(pages.bytes());
    return bytes;
}

// Memory comes a quarter of what there is at a time, and a huge page at least.
void Decoder::reserve(Text& text, std::int64_t positions) {
    while (static_cast<std::int64_t>(text.blocks.size()) < blocks_of(positions)) {
        if (free_.empty()) {
            constexpr std::int64_t least = 2 << 20;
            const std::int64_t bytes = block_bytes(), count = (std::max(least, cached_bytes() / 4) + bytes - 1) / bytes;
            free_.reserve(free_.size() + size(count));
            memory_.emplace_back(size(count * bytes));
            for (std::int64_t i = count - 1; i >= 0; --i) free_.push_back(memory_.back().data() + i * bytes);
        }
        text.blocks.push_back(free_.back());
        free_.pop_back();
    }
}

void Decoder::shorten(Text& text, std::int64_t length) {
    text.length = std::clamp<std::int64_t>(length, 0, text.length);
    for (; static_cast<std::int64_t>(text.blocks.size()) > blocks_of(text.length); text.blocks.pop_back())
        free_.push_back(text.blocks.back());
}

std::int64_t Decoder::block_bytes() const {
    const std::int64_t heads = static_cast<std::int64_t>(blocks_.size()) * 2 * dimensions_.kv_heads;
    return heads * Cached::bytes(dimensions_.head_dim, stored_);
}

Cached Decoder::cached(std::int32_t text, std::size_t layer, std::int64_t head) const {
    const std::int64_t heads = dimensions_.kv_heads, bytes = Cached::bytes(dimensions_.head_dim, stored_);
    const std::int64_t keys = (static_cast<std::int64_t>(layer) * 2 * heads + head) * bytes;
    return {at(text).blocks.data(), keys, keys + heads * bytes, dimensions_.head_dim, stored_};
}

}  // namespace upq::cpu

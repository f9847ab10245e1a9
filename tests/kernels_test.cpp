// The kernels without Python: random weights and tokens of random shapes against double, and the decoder against itself,
// on every instruction set that this machine runs. Made for sanitizers (make sanitize) and foreign processors (make
// cross); tests/test_kernels.py and tests/test_decoding.py test more.
//
//     kernels_test [cases] [instruction set]

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "books.hpp"
#include "decoder.hpp"
#include "dispatch.hpp"
#include "linears.hpp"
#include "reals.hpp"

using namespace upq::cpu;

namespace {

struct Random {
    std::mt19937 engine;

    int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
    float normal() { return std::normal_distribution<float>()(engine); }
    template <class T>
    T one_of(std::initializer_list<T> choices) { return choices.begin()[between(0, static_cast<int>(choices.size()) - 1)]; }
};

std::vector<std::uint8_t> stored(const std::vector<float>& values, Real real) {
    std::vector<std::uint8_t> bytes(values.size() * (real == Real::f32 ? 4 : 2));
    for (std::size_t i = 0; i < values.size(); ++i) {
        if (real == Real::f32) {
            std::memcpy(&bytes[4 * i], &values[i], 4);
            continue;
        }
        const std::uint16_t half = real == Real::f16 ? narrow_f16(values[i]) : narrow_bf16(values[i]);
        std::memcpy(&bytes[2 * i], &half, 2);
    }
    return bytes;
}

struct Weight {
    Canonical shape;
    std::vector<std::uint8_t> codes, packed, scales, zeros, bias;

    Weight(Random& random, std::int64_t columns, std::int64_t groups) {
        const int bits = random.between(2, 8);
        const std::int64_t rows = random.between(1, 140), row_bytes = (columns * bits + 7) / 8;
        const Real real = random.one_of({Real::f32, Real::f16, Real::bf16});
        codes.resize(static_cast<std::size_t>(rows * columns));
        packed.resize(static_cast<std::size_t>(rows * row_bytes));
        for (std::int64_t i = 0; i < rows * columns; ++i) {
            const int code = random.between(0, (1 << bits) - 1);
            codes[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(code);
            const std::int64_t bit = i % columns * bits, first = i / columns * row_bytes + bit / 8;
            packed[static_cast<std::size_t>(first)] |= static_cast<std::uint8_t>(code << bit % 8);
            if (bit % 8 + bits > 8) packed[static_cast<std::size_t>(first + 1)] |= static_cast<std::uint8_t>(code >> (8 - bit % 8));
        }
        std::vector<float> scale, zero, add;
        for (std::int64_t i = 0; i < rows * groups; ++i) {
            scale.push_back(0.01f + 0.02f * std::abs(random.normal()));
            zero.push_back(static_cast<float>(random.between(0, (1 << bits) - 1)));
        }
        for (std::int64_t i = 0; i < rows; ++i) add.push_back(random.normal());
        scales = stored(scale, real);
        if (random.between(0, 1)) zeros = stored(zero, real);
        if (random.between(0, 1)) bias = stored(add, real);
        const float constant = static_cast<float>((1 << bits) - 1) / 2;
        shape = {rows, columns, groups, bits, packed.data(), scales.data(), zeros.empty() ? nullptr : zeros.data(), constant, real};
    }

    double value(std::int64_t row, std::int64_t column) const {
        const std::int64_t group = row * shape.groups + column / (shape.columns / shape.groups);
        const double zero = shape.zeros ? widen(shape.zeros, shape.real, group) : shape.zero;
        return (codes[static_cast<std::size_t>(row * shape.columns + column)] - zero) * widen(shape.scales, shape.real, group);
    }
};

// Tokens as the products must see them: in double, rounded to int8 for w2a8.
std::vector<double> seen(const Rows& x, std::int64_t token, Compute compute) {
    std::vector<double> row;
    float peak = 0;
    for (std::int64_t i = 0; i < x.columns; ++i) {
        row.push_back(widen(x.data, x.real, token * x.columns + i));
        peak = std::max(peak, std::abs(static_cast<float>(row.back())));
    }
    if (compute == Compute::w2a16) return row;
    const float inverse = 127.0f / peak;
    for (double& v : row) v = peak > 0 ? static_cast<double>(std::nearbyint(static_cast<float>(v) * inverse)) * (peak / 127.0f) : 0;
    return row;
}

// Relative error of one product over all its outputs.
double error_of(const Weight& w, const Rows& x, const Output& y, Compute compute) {
    double wrong = 0, right = 1e-30;
    for (std::int64_t token = 0; token < x.tokens; ++token) {
        const std::vector<double> row = seen(x, token, compute);
        for (std::int64_t o = 0; o < w.shape.rows; ++o) {
            double exact = y.bias ? widen(y.bias, y.bias_real, o) : 0;
            for (std::int64_t i = 0; i < x.columns; ++i) exact += row[static_cast<std::size_t>(i)] * w.value(o, i);
            const double difference = widen(y.data, y.real, token * w.shape.rows + o) - exact;
            wrong += difference * difference;
            right += exact * exact;
        }
    }
    return std::sqrt(wrong / right);
}

bool run_case(unsigned seed, const Kernels& kernels) {
    Random random{std::mt19937(seed)};
    const bool grouped = random.between(0, 1);
    const bool wide = seed % 8 == 4;  // more than is unpacked at a time
    const int group = 8 * random.between(1, 12), groups = grouped ? random.between(1, wide ? 20 : 6) : 1;
    // now and then longer than a segment
    const std::int64_t columns = grouped ? group * groups : seed % 64 == 0 ? 70001 : random.between(1, wide ? 2000 : 500);
    // from 24 on codes are unpacked for all of them, from 64 on in portions
    const std::int64_t tokens = columns > 2000 ? 1 : seed % 4 ? random.between(1, 20) : random.between(24, 140);
    const Real real = random.one_of({Real::f32, Real::f16, Real::bf16});
    std::vector<float> values;
    for (std::int64_t i = 0; i < tokens * columns; ++i) values.push_back(random.normal() * (random.between(0, 99) ? 1.0f : 30.0f));
    const std::vector<std::uint8_t> data = stored(values, real);
    const Rows x{data.data(), real, tokens, columns};

    std::vector<Weight> weights;
    for (int i = random.between(1, 3); i > 0; --i) weights.emplace_back(random, columns, groups);
    const int threads = random.between(1, 3);
    std::vector<PackedMatrix> matrices;
    std::vector<std::vector<std::uint8_t>> outputs;
    for (const Weight& w : weights) {
        matrices.emplace_back(w.shape, threads);
        outputs.emplace_back(static_cast<std::size_t>(tokens * w.shape.rows) * (real == Real::f32 ? 4 : 2));
    }
    std::vector<Product> products;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const void* bias = weights[i].bias.empty() ? nullptr : weights[i].bias.data();
        products.push_back({&matrices[i], {outputs[i].data(), real, bias, weights[i].shape.real}});
    }
    bool good = true;
    for (const Compute compute : {Compute::w2a8, Compute::w2a16}) {
        linears(kernels, x, products, compute, threads);
        for (std::size_t i = 0; i < weights.size(); ++i) {
            const double error = error_of(weights[i], x, products[i].output, compute);
            const double rounding = real == Real::f32 ? 0 : real == Real::f16 ? 5e-4 : 4e-3;  // of the outputs' type
            if (error < (compute == Compute::w2a8 ? 1e-6 : 1e-5) + rounding) continue;
            std::printf("%s seed %u %s: relative error %.2e\n", kernels.name, seed, compute == Compute::w2a8 ? "w2a8" : "w2a16", error);
            good = false;
        }
    }
    return good;
}

// --- the decoder ----------------------------------------------------------------------------------------------------

std::vector<float> normals(Random& random, std::int64_t count, float size = 1.0f) {
    std::vector<float> values;
    for (std::int64_t i = 0; i < count; ++i) values.push_back(size * random.normal());
    return values;
}

double error_of(const std::vector<float>& found, const std::vector<double>& exact) {
    double wrong = 0, right = 1e-30;
    for (std::size_t i = 0; i < exact.size(); ++i) {
        wrong += (found[i] - exact[i]) * (found[i] - exact[i]);
        right += exact[i] * exact[i];
    }
    return std::sqrt(wrong / right);
}

double dense_error(Random& random, const Kernels& kernels) {
    const Real real = random.one_of({Real::f32, Real::f16, Real::bf16});
    const int rows = random.between(1, 9), columns = random.between(1, 300), tokens = random.between(1, 8);
    const std::vector<std::uint8_t> weight = stored(normals(random, rows * columns), real);
    const std::vector<float> x = normals(random, tokens * columns);
    std::vector<float> y(static_cast<std::size_t>(tokens * rows));
    const int half = random.between(0, rows);
    for (const Range part : {Range{0, half}, Range{half, rows}})
        kernels.dense({rows, columns, weight.data(), real}, x.data(), tokens, part, y.data());
    std::vector<double> exact(y.size());
    for (int i = 0; i < tokens * rows; ++i)
        for (int c = 0; c < columns; ++c)
            exact[static_cast<std::size_t>(i)] += static_cast<double>(widen(weight.data(), real, i % rows * columns + c)) *
                                                  x[static_cast<std::size_t>(i / rows * columns + c)];
    return error_of(y, exact);
}

double norm_error(Random& random, const Kernels& kernels) {
    const int n = random.between(1, 300);
    const std::vector<float> x = normals(random, n, 3.0f), weight = normals(random, n);
    std::vector<float> y = x;
    kernels.rms_norm(y.data(), weight.data(), 1e-5f, n, y.data());
    double mean = 0;
    for (const float v : x) mean += static_cast<double>(v) * v / n;
    std::vector<double> exact;
    for (std::size_t i = 0; i < x.size(); ++i) exact.push_back(weight[i] * x[i] / std::sqrt(mean + 1e-5));
    return error_of(y, exact);
}

double gate_error(Random& random, const Kernels& kernels) {
    const int n = random.between(1, 300);
    const std::vector<float> gate = normals(random, n, 20.0f), up = normals(random, n);
    const bool silu = random.between(0, 1);
    std::vector<float> out = gate;
    kernels.gated(silu ? Activation::silu : Activation::gelu_tanh, out.data(), up.data(), n, out.data());
    std::vector<double> exact;
    for (std::size_t i = 0; i < gate.size(); ++i) {
        const double x = gate[i], u = std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
        exact.push_back((silu ? x / (1 + std::exp(-x)) : 0.5 * x * (1 + std::tanh(u))) * up[i]);
    }
    return error_of(out, exact);
}

// Fake weights of SEQ and the gradients of w and Δ, one after the other.
double seq_error(Random& random, const Kernels& kernels) {
    const int groups = random.between(1, 5), size = random.between(1, 300), n = 1 << random.between(1, 7);
    const std::vector<float> w = normals(random, groups * size, 2.0f), grad = normals(random, groups * size);
    std::vector<float> scale, found(w.size()), d_w(w.size()), d_delta(static_cast<std::size_t>(groups));
    for (int g = 0; g < groups; ++g) scale.push_back(0.1f + std::abs(random.normal()));
    const float bound = static_cast<float>(n) - 0.02f;
    const int half = random.between(0, groups);
    for (const Range part : {Range{0, half}, Range{half, groups}}) {
        kernels.fake_seq(w.data(), scale.data(), part, size, static_cast<float>(n), found.data());
        kernels.seq_gradient(
            grad.data(), w.data(), scale.data(), part, size, static_cast<float>(n), bound, 0.5f, d_w.data(), d_delta.data()
        );
    }
    std::vector<double> exact, of_w, of_delta(d_delta.size());
    for (std::size_t i = 0; i < w.size(); ++i) {
        const std::size_t g = i / static_cast<std::size_t>(size);
        const float u = w[i] / scale[g];
        const double level = std::clamp<double>(std::floor(u), -n, n - 1) + 0.5;
        const bool inside = std::abs(u) < bound;
        exact.push_back(level * scale[g]);
        of_w.push_back(inside ? grad[i] : 0.0);
        of_delta[g] += 0.5 * grad[i] * (level - (inside ? u : 0.0)) / n;
    }
    for (const auto& [more, of] : {std::pair{&d_w, &of_w}, std::pair{&d_delta, &of_delta}}) {
        found.insert(found.end(), more->begin(), more->end());
        exact.insert(exact.end(), of->begin(), of->end());
    }
    return error_of(found, exact);
}

// Value and gradient of the generalised Jensen-Shannon divergence.
double gjs_error(Random& random, const Kernels& kernels) {
    const Real own = random.one_of({Real::f32, Real::bf16}), its = random.one_of({Real::f32, Real::bf16});
    const int tokens = random.between(1, 3), n = random.between(2, 5000);
    const float beta = 0.1f * static_cast<float>(random.between(1, 9));
    const std::vector<std::uint8_t> student = stored(normals(random, tokens * n, 3.0f), own);
    const std::vector<std::uint8_t> teacher = stored(normals(random, tokens * n, 3.0f), its);
    std::vector<float> value(static_cast<std::size_t>(tokens)), found(static_cast<std::size_t>(tokens * n));
    const Rows rows{student.data(), own, tokens, n}, expected{teacher.data(), its, tokens, n};
    kernels.gjs(rows, expected, {0, tokens}, beta, value.data(), found.data());
    std::vector<double> exact, values;
    for (int t = 0; t < tokens; ++t) {
        const auto softmax = [&](const std::vector<std::uint8_t>& z, Real real) {
            std::vector<double> p;
            double sum = 0;
            for (int i = 0; i < n; ++i) p.push_back(std::exp(static_cast<double>(widen(z.data(), real, t * n + i))));
            for (const double each : p) sum += each;
            for (double& each : p) each /= sum;
            return p;
        };
        const std::vector<double> q = softmax(student, own), p = softmax(teacher, its);
        double kl_q = 0, kl_p = 0;
        for (std::size_t i = 0; i < q.size(); ++i) {
            const double m = beta * p[i] + (1.0 - beta) * q[i];
            kl_q += q[i] * std::log(q[i] / m);
            kl_p += p[i] * std::log(p[i] / m);
        }
        for (std::size_t i = 0; i < q.size(); ++i)
            exact.push_back((1.0 - beta) * q[i] * (std::log(q[i] / (beta * p[i] + (1.0 - beta) * q[i])) - kl_q));
        values.push_back(beta * kl_p + (1.0 - beta) * kl_q);
    }
    return std::max(error_of(found, exact), error_of(value, values));
}

// Keys and values of a head in the blocks of a cache, behind those of another head; what no position fills is NaN.
struct Cache {
    std::int64_t dim;
    Stored stored;
    std::vector<std::vector<std::uint8_t>> held{};
    std::vector<const std::uint8_t*> blocks{};

    Cached view() const {
        const std::int64_t bytes = Cached::bytes(dim, stored);
        return {blocks.data(), bytes, 2 * bytes, dim, stored};
    }
    void extend() {
        auto& block = held.emplace_back(static_cast<std::size_t>(3 * Cached::bytes(dim, stored)));
        for (std::size_t i = 0; i + 4 <= block.size(); i += 4) std::memcpy(&block[i], &nan, 4);
        blocks.push_back(block.data());
    }
    // Returns the value that is held: the nearest of those that int8 can hold with this position's scale.
    float put(bool key, std::int64_t position, std::int64_t d, float value) {
        const std::int64_t bytes = Cached::bytes(dim, stored), at = position % key_block;
        std::uint8_t* const head = held[static_cast<std::size_t>(position / key_block)].data() + (key ? bytes : 2 * bytes);
        const std::int64_t i = key ? d * key_block + at : at * dim + d;
        if (stored == Stored::f32) {
            std::memcpy(head + 4 * i, &value, 4);
            return value;
        }
        const float scale = 0.01f * static_cast<float>(at + 1);
        const auto code = static_cast<std::int8_t>(std::lround(std::clamp(value / scale, -127.0f, 127.0f)));
        std::memcpy(head + i, &code, 1);
        std::memcpy(head + key_block * dim + 4 * at, &scale, 4);
        return static_cast<float>(code) * scale;
    }
    static constexpr float nan = std::numeric_limits<float>::quiet_NaN();
};

double attention_error(Random& random, const Kernels& kernels) {
    const int dim = random.between(1, 150), count = random.between(1, 4), end = random.between(1, 70);
    const Range seen{random.between(0, 1) ? random.between(0, end - 1) : 0, end};
    const float scaling = 1 / std::sqrt(static_cast<float>(dim));
    const std::vector<float> queries = normals(random, count * dim, 3.0f);
    std::vector<float> keys = normals(random, end * dim), values = normals(random, end * dim);
    Cache cache{dim, random.one_of({Stored::f32, Stored::int8})};
    for (int p = 0; p < end; ++p) {
        if (p % key_block == 0) cache.extend();
        for (int d = 0; d < dim; ++d)
            for (auto* each : {&keys, &values}) {
                float& value = (*each)[static_cast<std::size_t>(p * dim + d)];
                value = cache.put(each == &keys, p, d, value);
            }
    }
    std::vector<float> scratch(static_cast<std::size_t>(count * (end + 2 * key_block) + key_block * dim)), out(queries.size());
    kernels.attend(cache.view(), queries.data(), count, seen, scaling, scratch.data(), out.data());
    std::vector<double> exact(out.size());
    for (int q = 0; q < count; ++q) {
        double sum = 0;
        for (auto p = seen.begin; p < seen.end; ++p) {
            double score = 0;
            for (int d = 0; d < dim; ++d)
                score += static_cast<double>(queries[static_cast<std::size_t>(q * dim + d)]) *
                         keys[static_cast<std::size_t>(p * dim + d)];
            const double share = std::exp(score * scaling);
            sum += share;
            for (int d = 0; d < dim; ++d)
                exact[static_cast<std::size_t>(q * dim + d)] += share * values[static_cast<std::size_t>(p * dim + d)];
        }
        for (int d = 0; d < dim; ++d) exact[static_cast<std::size_t>(q * dim + d)] /= sum;
    }
    return error_of(out, exact);
}

// Dense weights for a decoder of a few blocks; tests/test_decoding.py compares packed ones with transformers.
struct Weights {
    Random& random;
    std::vector<std::vector<float>> held{};

    const float* floats(std::int64_t count, float size) { return held.emplace_back(normals(random, count, size)).data(); }
    Norm norm(std::int64_t size) { return {floats(size, 1.0f), 1e-6f, size}; }
    Norm maybe_norm(std::int64_t size) { return random.between(0, 1) ? norm(size) : Norm{nullptr, 0.0f, 0}; }
    Dense dense(std::int64_t rows, std::int64_t columns) { return {rows, columns, floats(rows * columns, 0.2f), Real::f32}; }
    Linear linear(std::int64_t rows, std::int64_t columns) {
        return {dense(rows, columns), random.between(0, 1) ? floats(rows, 0.2f) : nullptr};
    }
    std::vector<Linear> fused_or_not(std::initializer_list<std::int64_t> rows, std::int64_t columns) {
        if (random.between(0, 1)) return {linear(std::accumulate(rows.begin(), rows.end(), std::int64_t{0}), columns)};
        std::vector<Linear> apart;
        for (const std::int64_t each : rows) apart.push_back(linear(each, columns));
        return apart;
    }
    Mlp mlp(std::int64_t hidden, std::int64_t width) { return {fused_or_not({width, width}, hidden), linear(hidden, width)}; }
    Experts experts(std::int64_t hidden, std::int64_t width) {
        const int count = random.between(1, 6);
        std::vector<Mlp> each;
        for (int i = 0; i < count; ++i) each.push_back(mlp(hidden, width));
        return {dense(count, hidden), each, random.between(1, count), random.between(0, 1) > 0};
    }
};

// The same tokens in one portion, in several beside another text's, and again after others: the same logits, bit for bit.
bool decodes_alike(Random& random, const Kernels& kernels) {
    Weights weights{random};
    const std::int64_t kv_heads = random.between(1, 2), heads = kv_heads * random.between(1, 3), dim = 2 * random.between(1, 12);
    const std::int64_t hidden = random.between(1, 40), mlp = random.between(1, 50), vocabulary = 20;
    std::vector<float> frequencies;
    for (int i = 0; i < dim / 2; ++i) frequencies.push_back(std::pow(0.1f, static_cast<float>(i)));
    std::vector<Block> blocks;
    for (int i = random.between(1, 3); i > 0; --i) {
        const bool whole = random.between(0, 1);
        std::variant<Mlp, Experts> fed = weights.mlp(hidden, mlp);
        if (random.between(0, 1)) fed = weights.experts(hidden, mlp);
        blocks.push_back({
            weights.maybe_norm(hidden), weights.maybe_norm(hidden), weights.maybe_norm(hidden), weights.maybe_norm(hidden),
            weights.maybe_norm(whole ? heads * dim : dim), weights.maybe_norm(whole ? kv_heads * dim : dim),
            weights.fused_or_not({heads * dim, kv_heads * dim, kv_heads * dim}, hidden), weights.linear(hidden, heads * dim),
            fed, random.one_of({Activation::silu, Activation::gelu_tanh}), 0.3f, random.between(-1, 1),
            random.between(0, 1) ? random.between(1, 30) : 0, 0.5f,
        });
    }
    const std::vector<Rope> ropes{{frequencies.data(), dim / 2, 1.0f}, {frequencies.data(), random.between(1, static_cast<int>(dim / 2)), 1.2f}};
    Decoder decoder(
        {hidden, heads, kv_heads, dim, 2.0f, ropes}, weights.dense(vocabulary, hidden), blocks, weights.norm(hidden),
        weights.linear(vocabulary, hidden), random.one_of({Stored::f32, Stored::int8})
    );
    std::vector<std::int32_t> ids;
    for (int i = random.between(2, 200); i > 0; --i) ids.push_back(random.between(0, 19));
    std::vector<float> whole(20), parts(40);
    const std::span<const std::int32_t> all(ids);
    const Portion first[] = {{decoder.open(), all}};
    const std::int32_t text = first[0].text, other = decoder.open();
    decoder.forward(kernels, first, Compute::w2a8, random.between(1, 3), whole.data());
    decoder.truncate(text, random.between(0, static_cast<int>(ids.size()) - 1));
    while (decoder.length(text) < static_cast<std::int64_t>(ids.size())) {
        const auto rest = all.subspan(static_cast<std::size_t>(decoder.length(text)));
        const auto count = static_cast<std::size_t>(random.between(1, static_cast<int>(rest.size())));
        const Portion portions[] = {{text, rest.first(count)}, {other, all.first(static_cast<std::size_t>(random.between(1, 9)) % ids.size() + 1)}};
        decoder.forward(kernels, {portions, static_cast<std::size_t>(random.between(1, 2))}, Compute::w2a8, random.between(1, 3), parts.data());
        if (random.between(0, 3) == 0) {
            decoder.close(other);  // its blocks go to the next text
            if (decoder.open() != other) return false;
        }
    }
    return std::memcmp(whole.data(), parts.data(), sizeof(float) * whole.size()) == 0;
}

bool decoder_case(unsigned seed, const Kernels& kernels) {
    Random random{std::mt19937(seed)};
    bool good = decodes_alike(random, kernels);
    if (!good) std::printf("%s seed %u: the decoder depends on portions\n", kernels.name, seed);
    const std::pair<const char*, double (*)(Random&, const Kernels&)> steps[] = {
        {"dense", dense_error}, {"norm", norm_error}, {"gate", gate_error}, {"attention", attention_error},
        {"seq", seq_error}, {"gjs", gjs_error}
    };
    for (const auto& [name, error_of_step] : steps) {
        const double error = error_of_step(random, kernels);
        if (error < 2e-6) continue;
        std::printf("%s seed %u %s: relative error %.2e\n", kernels.name, seed, name, error);
        good = false;
    }
    return good;
}

// Code books against double; each token by itself has the bits that it has among others.
bool books_case(unsigned seed, const Kernels& kernels) {
    Random random{std::mt19937(seed)};
    const std::int64_t rows = random.between(1, 70), vectors = random.between(1, 40), tokens = random.between(1, 20);
    const std::int64_t columns = vectors * book_vector;
    const int books = random.between(1, 4), threads = random.between(1, 3);
    std::vector<std::uint8_t> codes;
    std::vector<float> values, scales, x;
    for (std::int64_t i = 0; i < rows * vectors * books; ++i) codes.push_back(static_cast<std::uint8_t>(random.between(0, 255)));
    for (std::int64_t i = 0; i < books * book_rows * book_vector; ++i) values.push_back(random.normal());
    for (std::int64_t i = 0; i < rows; ++i) scales.push_back(0.01f + std::abs(random.normal()));
    for (std::int64_t i = 0; i < tokens * columns; ++i) x.push_back(random.normal());
    const PackedBooks packed({rows, columns, books, codes.data(), values.data(), scales.data()});
    const auto product = [&](std::int64_t first, std::int64_t count, int team) {
        std::vector<float> y(static_cast<std::size_t>(count * rows));
        const Rows some{x.data() + first * columns, Real::f32, count, columns};
        book_linear(kernels, some, packed.view(), {y.data(), Real::f32, nullptr, Real::f32}, team);
        return y;
    };
    const std::vector<float> all = product(0, tokens, threads);
    double wrong = 0, right = 1e-30;
    for (std::int64_t t = 0; t < tokens; ++t) {
        const std::vector<float> alone = product(t, 1, 1);
        for (std::int64_t o = 0; o < rows; ++o) {
            const float found = all[static_cast<std::size_t>(t * rows + o)];
            if (std::bit_cast<std::uint32_t>(alone[static_cast<std::size_t>(o)]) != std::bit_cast<std::uint32_t>(found)) {
                std::printf("%s, books %u: token %d alone has other bits\n", kernels.name, seed, static_cast<int>(t));
                return false;
            }
            double exact = 0;
            for (std::int64_t i = 0; i < columns; ++i)
                for (int m = 0; m < books; ++m) {
                    const int k = codes[static_cast<std::size_t>((o * vectors + i / book_vector) * books + m)];
                    const std::int64_t at = (m * book_rows + k) * book_vector + i % book_vector;
                    exact += static_cast<double>(x[static_cast<std::size_t>(t * columns + i)]) * values[static_cast<std::size_t>(at)];
                }
            exact *= scales[static_cast<std::size_t>(o)];
            wrong += (found - exact) * (found - exact);
            right += exact * exact;
        }
    }
    if (wrong <= 4e-12 * right) return true;
    std::printf("%s, books %u: relative error %g\n", kernels.name, seed, std::sqrt(wrong / right));
    return false;
}

}  // namespace

int main(int count, char** arguments) {
    const unsigned cases = count > 1 ? static_cast<unsigned>(std::atoi(arguments[1])) : 100;
    int bad = 0, ran = 0;
    for (const Kernels* kernels : available()) {
        if (count > 2 && std::string(arguments[2]) != kernels->name) continue;
        for (unsigned seed = 0; seed < cases; ++seed) {
            bad += !run_case(seed, *kernels) + !decoder_case(seed, *kernels) + !books_case(seed, *kernels);
        }
        std::printf("%s: %u cases\n", kernels->name, cases);
        ++ran;
    }
    if (!ran) std::printf("this machine does not run %s\n", arguments[2]);
    return bad > 0 || !ran;
}

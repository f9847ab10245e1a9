// The kernels without Python: random weights and tokens of random shapes against double, on every instruction set that
// this machine runs. Made for sanitizers (make sanitize) and foreign processors (make cross); tests/test_kernels.py
// tests more.
//
//     kernels_test [cases] [instruction set]

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

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
    const int group = 8 * random.between(1, 12), groups = grouped ? random.between(1, 6) : 1;
    // now and then longer than a segment
    const std::int64_t columns = grouped ? group * groups : seed % 64 == 0 ? 70001 : random.between(1, 500);
    const std::int64_t tokens = columns > 1000 ? 1 : random.between(1, 20);
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

}  // namespace

int main(int count, char** arguments) {
    const unsigned cases = count > 1 ? static_cast<unsigned>(std::atoi(arguments[1])) : 100;
    int bad = 0, ran = 0;
    for (const Kernels* kernels : available()) {
        if (count > 2 && std::string(arguments[2]) != kernels->name) continue;
        for (unsigned seed = 0; seed < cases; ++seed) bad += !run_case(seed, *kernels);
        std::printf("%s: %u cases\n", kernels->name, cases);
        ++ran;
    }
    if (!ran) std::printf("this machine does not run %s\n", arguments[2]);
    return bad > 0 || !ran;
}

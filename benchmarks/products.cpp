// The kernels on the linears of a model, cold from memory, without Python in between: `benchmarks/products.py --compiled`
// builds this and says which linears. A plain read of as many bytes takes turns with them. One thread, processor time.
//
//     products TOKENS REPEATS BITS GROUP CALL...     CALL is ROWS[+ROWS...]:COLUMNS, matrices that read one input
//
// Writes one JSON object: the bytes held, and seconds of each engine in every repeat; a first round warms up.

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <new>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "dispatch.hpp"
#include "linears.hpp"

using namespace upq::cpu;

namespace {

double now() {
    timespec spent{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
    return static_cast<double>(spent.tv_sec) + 1e-9 * static_cast<double>(spent.tv_nsec);
}

struct Call {
    std::vector<PackedMatrix> matrices;  // that read one input
    std::int64_t columns = 0;
};

PackedMatrix random_matrix(std::mt19937& random, std::int64_t rows, std::int64_t columns, std::int64_t group, int bits) {
    const std::int64_t groups = group < 0 ? 1 : columns / group;
    std::vector<std::uint32_t> codes(static_cast<std::size_t>(rows * columns * bits / 32 + 1));
    for (std::uint32_t& word : codes) word = random();
    const std::vector<std::uint16_t> scales(static_cast<std::size_t>(rows * groups), 0x2000);  // 2^-7 in float16
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(codes.data());
    const float zero = static_cast<float>((1 << bits) - 1) / 2;
    return PackedMatrix({rows, columns, groups, bits, bytes, scales.data(), nullptr, zero, Real::f16}, 1);
}

Call parse(const std::string& text, std::mt19937& random, std::int64_t group, int bits) {
    Call call;
    const std::size_t colon = text.find(':');
    call.columns = std::stoll(text.substr(colon + 1));
    std::stringstream rows(text.substr(0, colon));
    for (std::string each; std::getline(rows, each, '+');)
        call.matrices.push_back(random_matrix(random, std::stoll(each), call.columns, group, bits));
    return call;
}

// Memory on huge pages, all of it touched.
const std::uint64_t* ruler(std::size_t bytes) {
    constexpr std::size_t huge_page = std::size_t{2} << 20;
    void* found = mmap(nullptr, bytes + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    const auto start = (reinterpret_cast<std::uintptr_t>(found) + huge_page - 1) / huge_page * huge_page;
    auto* words = reinterpret_cast<std::uint64_t*>(start);
#ifdef MADV_HUGEPAGE
    madvise(words, bytes, MADV_HUGEPAGE);
#endif
    for (std::size_t i = 0; i < bytes / 8; ++i) words[i] = 1;
    return words;
}

std::uint64_t sum(const std::uint64_t* words, std::size_t count) {
    std::uint64_t sums[16] = {};  // eight registers of SSE2, so that no sum waits for another
    for (std::size_t i = 0; i + 16 <= count; i += 16)
        for (std::size_t j = 0; j < 16; ++j) sums[j] += words[i + j];
    std::uint64_t all = 0;
    for (const std::uint64_t each : sums) all += each;
    return all;
}

void show(const char* name, const std::vector<double>& seconds) {
    std::printf("\"%s\": [", name);
    for (std::size_t i = 0; i < seconds.size(); ++i) std::printf("%s%.9f", i ? ", " : "", seconds[i]);
    std::printf("]");
}

}  // namespace

int main(int count, char** words) {
    if (count < 6) return 2;
    const std::int64_t tokens = std::atoll(words[1]), group = std::atoll(words[4]);
    const int repeats = std::atoi(words[2]), bits = std::atoi(words[3]);
    std::mt19937 random;
    std::vector<Call> calls;
    for (int i = 5; i < count; ++i) calls.push_back(parse(words[i], random, group, bits));
    std::size_t held = 0;
    std::int64_t widest = 0, outputs = 0;
    for (const Call& call : calls) {
        std::int64_t rows = 0;
        for (const PackedMatrix& w : call.matrices) held += w.bytes(), rows += w.view().rows;
        widest = std::max(widest, call.columns);
        outputs = std::max(outputs, rows);
    }
    std::vector<std::uint16_t> x(static_cast<std::size_t>(tokens * widest)), y(static_cast<std::size_t>(tokens * outputs));
    for (std::uint16_t& value : x) value = static_cast<std::uint16_t>(0x3f00 ^ (random() & 0x80ff));  // ±0.5 to ±2 in bfloat16
    const std::uint64_t* memory = ruler(held);
    std::vector<double> read, ours;
    volatile std::uint64_t sink = 0;
    for (int repeat = 0; repeat <= repeats; ++repeat) {
        const double start = now();
        sink = sum(memory, held / 8);
        const double between = now();
        for (const Call& call : calls) {
            std::vector<Product> products;
            std::uint16_t* out = y.data();
            for (const PackedMatrix& w : call.matrices) {
                products.push_back({&w, {out, Real::bf16, nullptr, Real::bf16}});
                out += tokens * w.view().rows;
            }
            linears(*available().front(), {x.data(), Real::bf16, tokens, call.columns}, products, Compute::w2a8, 1);
        }
        const double end = now();
        if (repeat == 0) continue;
        read.push_back(between - start);
        ours.push_back(end - between);
    }
    std::printf("{\"held\": %zu, ", held);
    show("read", read);
    std::printf(", ");
    show("upq", ours);
    std::printf("}\n");
}

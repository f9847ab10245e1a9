#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "layout.hpp"

namespace upq::cpu {

// Less work than this does not pay for waking a thread: 2^18 products take 4 to 8 µs.
inline constexpr std::int64_t least_work = 1 << 18;

// How many of `threads` are worth waking for so many products.
inline int useful_threads(std::int64_t products, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(products / least_work, 1, threads));
}

// body(thread, threads) on each of up to `threads` threads; the system may give fewer. `body` must not throw.
template <class Body>
void parallel(int threads, const Body& body) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    body(0, 1);
}

// Part `index` of `count` of [0, total), in whole multiples of `unit`.
inline Range share(std::int64_t total, std::int64_t index, std::int64_t count, std::int64_t unit = 1) {
    const std::int64_t units = (total + unit - 1) / unit;
    const auto cut = [&](std::int64_t i) { return std::min(total, units * i / count * unit); };
    return {cut(index), cut(index + 1)};
}

}  // namespace upq::cpu

#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "layout.hpp"

namespace upq::cpu {

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

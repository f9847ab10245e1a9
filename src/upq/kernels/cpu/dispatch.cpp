#include "dispatch.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace upq::cpu {

namespace {

#if defined(__x86_64__)

// The compiler's own test of these asks the operating system too: it must save the wide registers.
[[maybe_unused]] bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

[[maybe_unused]] bool has_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    // Leaf 7.1, EAX bit 4; not by name, which clang knows only from version 16.
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1u);
}

[[maybe_unused]] bool has_avx512vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

#elif defined(__aarch64__)

[[maybe_unused]] bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every Mac with an Arm processor
#endif
}

#endif

std::vector<const Kernels*> find() {
    std::vector<const Kernels*> found;
#ifdef UPQ_AVX512VNNI
    if (has_avx512vnni()) found.push_back(&avx512vnni);
#endif
#ifdef UPQ_AVXVNNI
    if (has_avxvnni()) found.push_back(&avxvnni);
#endif
#ifdef UPQ_AVX2
    if (has_avx2()) found.push_back(&avx2);
#endif
#ifdef UPQ_NEON
    if (has_dotprod()) found.push_back(&neon);
#endif
    found.push_back(&portable);
    return found;
}

}  // namespace

const std::vector<const Kernels*>& available() {
    static const std::vector<const Kernels*> found = find();
    return found;
}

}  // namespace upq::cpu

#pragma once

#include <vector>

#include "kernels.hpp"

namespace upq::cpu {

// What was compiled and this machine can run, the fastest first. Never empty: `portable` is the last.
const std::vector<const Kernels*>& available();

}  // namespace upq::cpu

#pragma once

#include <span>

#include "kernels.hpp"
#include "packed_matrix.hpp"

namespace upq::cpu {

enum class Compute { w2a8, w2a16 };

struct Product {
    const PackedMatrix* matrix;
    Output output;
};

// x · Ŵᵀ + bias for matrices that read the same tokens. The tokens are quantised once for all that are cut into the
// same groups. An output depends on its token and its row alone: how many tokens, matrices and threads take part makes no
// difference to a single bit. Throws std::bad_alloc.
void linears(const Kernels& kernels, const Rows& x, std::span<const Product> products, Compute compute, int threads);

}  // namespace upq::cpu

"""Coarse-to-fine outliers among magnitudes (CFP of CBQ, arXiv 2312.07950, section 3.3).

Coarse: magnitudes above Q3 + 1.5 (Q3 - Q1) are candidates. Fine: they are cut in two where the squared distance of the
means of the two sets, less the variances within them, is largest; the upper set is cut down to the largest magnitude
below it. Weights are truncated; channels of an activation are scaled down (transform `smooth`, rule `cfp`).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def threshold(magnitudes: Tensor, *, variance: float = 1.0) -> Tensor | None:
    """The largest magnitude that stays; None where none is a candidate. `variance`: λ₂, of the sets' variances."""
    flat = magnitudes.flatten().double()
    low, high = (flat.kthvalue(max(1, round(share * flat.numel()))).values for share in (0.25, 0.75))
    coarse = high + 1.5 * (high - low)
    outside = flat > coarse
    candidates = flat[outside].sort().values
    count = candidates.numel()
    if not count or count == flat.numel():
        return None
    rest = flat[~outside]
    # Sums over the upper set, from each cut on, and over the candidates below it.
    ones = torch.arange(count, 0, -1, dtype=torch.double, device=flat.device)
    upper, upper_squares = (x.flip(0).cumsum(0).flip(0) for x in (candidates, candidates.square()))
    below, below_squares = (x.cumsum(0) - x for x in (candidates, candidates.square()))
    under = count - ones
    mean_upper = upper / ones
    mean_lower = (rest.sum() + below) / (rest.numel() + under)
    var_upper = (upper_squares / ones - mean_upper.square()).clamp_min(0)
    var_below = (below_squares / under.clamp_min(1) - (below / under.clamp_min(1)).square()).clamp_min(0)
    cut = int(((mean_upper - mean_lower).square() - variance * (var_upper + var_below)).argmax())
    return candidates[cut - 1] if cut else rest.max()


def truncated(w_OI: Tensor) -> Tensor:
    """`w_OI`, of which only weights above the threshold change."""
    limit = threshold(w_OI.abs())
    if limit is None:
        return w_OI
    bound = limit.to(w_OI.dtype)
    return w_OI.clamp(-bound, bound)

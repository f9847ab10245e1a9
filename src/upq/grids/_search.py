"""Choose a grid's scale by search instead of by range: at 2 bits this decides most.

On Gaussian rows the range (Δ = max) costs a relative error of 0.53, the searched Δ 0.35 (docs/numerics.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from upq.core.scheme import QuantScheme, to_groups
from upq.grids._base import GRIDS, Params, stretches_of_rows

# A 2-bit row of n Gaussian weights wants Δ ≈ 2σ, and its maximum is near σ·sqrt(2 ln n): 0.4 to 0.9 of it. Heavy
# tails go lower; 1.3 lets short rows of few distinct magnitudes (INT4 values) put their maximum inside the top cell.
SHRINK = torch.linspace(0.10, 1.30, 61)


def search_scale(w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor | None = None) -> Params:
    """Per group, the parameters with the least squared error among shrunken ranges.

    `importance_I` weighs the error of each input feature. With E[x²] it is the diagonal of the layer's Hessian,
    and the search minimises the output error of a layer with uncorrelated inputs.
    """
    w_OI = w_OI.detach().float()
    importance_I = torch.ones(w_OI.shape[1], device=w_OI.device) if importance_I is None else importance_I.float()
    found = [_search(w_OI[rows], scheme, importance_I) for rows in stretches_of_rows(w_OI)]
    return {name: torch.cat([params[name] for params in found]) for name in found[0]}


def _search(w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor) -> Params:
    grid = GRIDS.get(scheme.grid)
    best = grid.init(w_OI, scheme)
    best_error_OG: Tensor | None = None
    for shrink in [1.0, *SHRINK.tolist()]:
        params = grid.init(w_OI * shrink, scheme)
        error_OI = (grid.fake(w_OI, params, scheme) - w_OI).square() * importance_I
        error_OG = to_groups(error_OI, scheme).sum(-1)
        if best_error_OG is None:
            best_error_OG = error_OG
            continue
        better_OG = error_OG < best_error_OG
        best = {k: torch.where(better_OG, params[k], v) for k, v in best.items()}
        best_error_OG = torch.where(better_OG, error_OG, best_error_OG)
    return best

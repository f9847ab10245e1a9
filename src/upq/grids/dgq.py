"""DGQ (arXiv 2310.04836): asymmetric integers whose group scale is itself an integer, times one float16 of the row.

`scale·(code - zero)` fits an int8, so a row is one int8 matrix times one number. Clipping to that is part of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upq.core.scales import SCALE_TYPES
from upq.core.scheme import QuantScheme
from upq.grids._base import GRIDS, OUTER, SMALLEST_SCALE, ZERO, Params, stored_scale
from upq.grids.affine import Affine, round_ste

_INT8 = 127.0
# Of the row's largest weight, which becomes 127: as in the authors' code, from 1.01 down to 0.2.
_SHARES = [1.02 - (i + 1) / 80 * 0.82 for i in range(80)]


class Dgq(Affine):
    """Parameters `log_scale` and `zero` (O, G), and `outer` (O, 1), the row's, which does not learn."""

    widths = (2, 3, 4)
    scale_dtypes = ("int8",)
    fixed = frozenset({OUTER})

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        params, outer_O1 = super().init(w_OI, scheme), _outer(w_OI, 1.0)
        # Rounded up, so that the levels cover the range.
        whole_OG = (params["log_scale"].exp() / outer_O1).ceil().clamp(1, _INT8)
        return self._params(params, whole_OG, outer_O1)

    def beside(self, scheme: QuantScheme) -> dict[str, torch.dtype]:
        return {ZERO: torch.uint8}

    def scale_and_zero(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        zero_OG = round_ste(params[ZERO]).clamp(0, scheme.levels - 1)
        return stored_scale(params["log_scale"].exp(), scheme, params[OUTER]), zero_OG

    def search(self, w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor) -> Params:
        """Each group's own scale first, then the row's: the one whose integers have the least error in the row."""
        start = GRIDS.get("affine").search(w_OI, _own(scheme), importance_I)
        wanted_OG = start["log_scale"].exp()
        best = self.init(w_OI, scheme)
        best_error_O1 = self._error(w_OI, best, scheme, importance_I).sum(-1, keepdim=True)
        for share in _SHARES:
            outer_O1 = _outer(w_OI, share)
            params = self._params(start, (wanted_OG / outer_O1).round().clamp(1, _INT8), outer_O1)
            error_O1 = self._error(w_OI, params, scheme, importance_I).sum(-1, keepdim=True)
            better_O1 = error_O1 < best_error_O1
            best = {k: torch.where(better_O1, params[k], v) for k, v in best.items()}
            best_error_O1 = torch.where(better_O1, error_O1, best_error_O1)
        return best

    def _params(self, start: Params, whole_OG: Tensor, outer_O1: Tensor) -> Params:
        return {"log_scale": (whole_OG * outer_O1).log(), ZERO: start[ZERO], OUTER: outer_O1}

    def _code(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor]:
        code_OGS, zero_OG, scale_OG = super()._code(w_OI, params, scheme)
        reach_OG = (_INT8 / (scale_OG / params[OUTER]).round()).floor().detach()
        low_OG, high_OG = zero_OG - reach_OG, zero_OG + reach_OG
        return torch.minimum(torch.maximum(code_OGS, low_OG[..., None]), high_OG[..., None]), zero_OG, scale_OG


def _own(scheme: QuantScheme) -> QuantScheme:
    """The same groups with scales of their own."""
    return QuantScheme(bits=scheme.bits, group_size=scheme.group_size, grid="affine", scale_dtype="float32")


def _outer(w_OI: Tensor, share: float) -> Tensor:
    """The row's factor (O, 1), as float16 holds it."""
    peak_O1 = w_OI.detach().float().abs().amax(-1, keepdim=True)
    return (peak_O1 * share / _INT8).clamp(SMALLEST_SCALE, SCALE_TYPES["float16"].largest).half().float()


GRIDS.register("dgq")(Dgq())

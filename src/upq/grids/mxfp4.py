"""MXFP4 (OCP Microscaling Formats 1.0): E2M1 levels, a power of two for 32 weights. 4.25 bits a weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from upq.core.levels import E2M1
from upq.core.scheme import QuantScheme, to_groups
from upq.grids._base import GRIDS, SMALLEST_SCALE, Params
from upq.grids._table import TableGrid

# A scale is twice as large where the largest weight would be this many levels' worth or more. On Gaussian weights the
# squared error is 0.0125 of them; with OCP's own rule, 8, it is 0.0132 (docs/numerics.md).
_TURN = 7.0


class Mxfp4(TableGrid):
    """Parameter `log_scale` (O, G), which does not learn: a step of it is a factor of two."""

    widths = (4,)
    scale_dtypes = ("e8m0",)
    group_sizes = (32,)
    fixed = frozenset({"log_scale"})
    scales_learn = False
    values = E2M1

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        peak_OG = to_groups(w_OI.detach().float(), scheme).abs().amax(-1).clamp_min(SMALLEST_SCALE * _TURN)
        # peak = m·2^e, ½ ≤ m < 1; the scale is the power of two with _TURN/2 ≤ peak/scale < _TURN
        mantissa, exponent = torch.frexp(peak_OG / _TURN)
        scale_OG = torch.ldexp(torch.ones_like(mantissa), exponent)
        return {"log_scale": scale_OG.log()}

    def candidates(self, w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor) -> Iterator[Params]:
        start_OG = self.init(w_OI, scheme)["log_scale"]
        for halvings in (1, 2, -1):
            yield {"log_scale": start_OG - halvings * torch.tensor(2.0).log()}


GRIDS.register("mxfp4")(Mxfp4())

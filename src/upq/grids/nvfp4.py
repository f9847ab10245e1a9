"""NVFP4: E2M1 levels, an E4M3 scale for 16 weights, one float32 for the matrix. 4.5 bits a weight.

The outer scale is a power of two. E4M3 has 17 octaves, so that costs nothing, and every product is exact: engines
multiply the three factors in different orders and get the same number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from upq.core.levels import E2M1
from upq.core.scales import SCALE_TYPES, SMALLEST_SCALE
from upq.core.scheme import QuantScheme, to_groups
from upq.grids._base import GRIDS, OUTER, Params
from upq.grids._table import TableGrid

_E4M3 = SCALE_TYPES["e4m3"]


@dataclass(frozen=True)
class Nvfp4(TableGrid):
    """Parameters `log_scale` (O, G) and `outer` (O, 1), which does not learn."""

    outer: float | None = None  # of the matrices that it is settled for

    widths = (4,)
    scale_dtypes = ("e4m3",)
    group_sizes = (16,)
    fixed = frozenset({OUTER})
    values = E2M1

    def settled(self, weights: Iterable[Tensor]) -> Self:
        if self.outer is not None:
            return self
        peak = max(float(w.abs().max()) for w in weights)
        # The range's scales end at half of E4M3's largest, so that twice as large ones can be stored.
        return type(self)(2.0 ** math.ceil(math.log2(max(2 * peak / (max(E2M1) * _E4M3.largest), SMALLEST_SCALE))))

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        outer = self.settled([w_OI.detach()]).outer
        assert outer is not None
        peak_OG = to_groups(w_OI.detach().float(), scheme).abs().amax(-1)
        scale_OG = (peak_OG / max(E2M1)).clamp_min(outer * _E4M3.smallest)
        return {"log_scale": scale_OG.log(), OUTER: torch.full_like(scale_OG[:, :1], outer)}

    def candidates(self, w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor) -> Iterator[Params]:
        """The scales that E4M3 has from half to twice the range's: an octave has eight."""
        params = self.init(w_OI, scheme)
        byte_OG = _E4M3.encode(params["log_scale"].exp() / params[OUTER]).int()
        most = int(_E4M3.encode(torch.tensor(_E4M3.largest)))
        for step in range(-8, 9):
            inner_OG = _E4M3.decode((byte_OG + step).clamp(1, most).to(torch.uint8))
            yield params | {"log_scale": (inner_OG * params[OUTER]).log()}


GRIDS.register("nvfp4")(Nvfp4())

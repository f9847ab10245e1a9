"""RaZeR (arXiv 2501.04052 v2): NVFP4 whose second zero is another level, chosen for each 16 weights. 4.5 bits a weight.

The code of -0 is +5, -5, +8 or -8. A scale has six bits (E3M3) and the choice the other two of its byte. The authors'
repository speaks of a patent application. No recipe of UPQ uses this grid; ask before you ship an encoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from upq.core.levels import E2M1, Levels, Table
from upq.core.scales import SCALE_TYPES, SMALLEST_SCALE
from upq.core.scheme import QuantScheme, to_groups
from upq.grids._base import GRIDS, OUTER, Grid, Params, stored_scale
from upq.grids._table import nearest

SPECIALS = (5.0, -5.0, 8.0, -8.0)
_MINUS_ZERO = 8
_SETS = tuple((*E2M1[:_MINUS_ZERO], special, *E2M1[_MINUS_ZERO + 1 :]) for special in SPECIALS)
_E3M3 = SCALE_TYPES["e3m3"]
CHOICE = "choice"


@dataclass(frozen=True)
class Razer(Grid):
    """Parameters `log_scale` and `choice` (O, G), and `outer` (O, 1). The scale learns, choice and outer do not."""

    outer: float | None = None  # of the matrices that it is settled for

    widths = (4,)
    scale_dtypes = ("e3m3",)
    group_sizes = (16,)
    uniform = False
    fixed = frozenset({OUTER, CHOICE})

    def settled(self, weights: Iterable[Tensor]) -> Self:
        if self.outer is not None:
            return self
        peak = max(float(w.abs().max()) for w in weights)
        return type(self)(2.0 ** math.ceil(math.log2(max(peak / (max(E2M1) * _E3M3.largest), SMALLEST_SCALE))))

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        """Of the four sets, each at its own range, the one of least error; of equal ones the first."""
        outer = self.settled([w_OI.detach()]).outer
        assert outer is not None
        w_OI = w_OI.detach().float()
        everywhere_I = torch.ones(w_OI.shape[1], device=w_OI.device)
        return self._best(w_OI, self._ranges(w_OI, scheme, outer), scheme, everywhere_I)

    def scale_and_levels(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Levels]:
        scale_OG = stored_scale(params["log_scale"].exp(), scheme, params[OUTER])
        return scale_OG, _table(params[CHOICE].to(torch.uint8))

    def fake(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        scale_OG, levels = self.scale_and_levels(params, scheme)
        assert isinstance(levels, Table)
        x_OGS = to_groups(w_OI.float(), scheme) / scale_OG[..., None]
        with torch.no_grad():
            choice_OG1 = params[CHOICE][..., None]
            special_OG1 = torch.tensor(SPECIALS, device=x_OGS.device)[choice_OG1.long()]
            level_OGS = levels.of(_codes(x_OGS, choice_OG1))
        edge = torch.tensor(max(E2M1), device=x_OGS.device)
        inside_OGS = torch.minimum(torch.maximum(x_OGS, special_OG1.minimum(-edge)), special_OG1.maximum(edge))
        # `x - x.detach()` is exactly 0, so the value is the level's.
        return ((level_OGS + (inside_OGS - inside_OGS.detach())) * scale_OG[..., None]).view_as(w_OI)

    @torch.no_grad()
    def codes(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        scale_OG, _ = self.scale_and_levels(params, scheme)
        x_OGS = to_groups(w_OI.float(), scheme) / scale_OG[..., None]
        return _codes(x_OGS, params[CHOICE][..., None]).view_as(w_OI)

    def beside(self, scheme: QuantScheme) -> dict[str, torch.dtype]:
        return {}  # the choice is in the byte of the scale

    def store_scale(self, stored_OG: Tensor, levels: Levels) -> Tensor:
        assert isinstance(levels, Table)
        assert levels.choice_OG is not None
        return stored_OG | levels.choice_OG << 6

    def load_levels(self, beside: dict[str, Tensor], scale_OG: Tensor, scheme: QuantScheme) -> Levels:
        return _table(scale_OG >> 6)

    def candidates(self, w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor) -> Iterator[Params]:
        """Every set with the scales that E3M3 has from half to twice the range's."""
        outer = self.settled([w_OI]).outer
        assert outer is not None
        most = int(_E3M3.encode(torch.tensor(_E3M3.largest)))
        for params in self._ranges(w_OI, scheme, outer):
            byte_OG = _E3M3.encode(params["log_scale"].exp() / outer).int()
            for step in range(-8, 9):
                inner_OG = _E3M3.decode((byte_OG + step).clamp(1, most).to(torch.uint8))
                yield params | {"log_scale": (inner_OG * outer).log()}

    def _ranges(self, w_OI: Tensor, scheme: QuantScheme, outer: float) -> Iterator[Params]:
        peak_OG = to_groups(w_OI, scheme).abs().amax(-1)
        for choice, special in enumerate(SPECIALS):
            scale_OG = (peak_OG / max(max(E2M1), abs(special))).clamp_min(outer * _E3M3.smallest)
            outer_O1 = torch.full_like(scale_OG[:, :1], outer)
            yield {"log_scale": scale_OG.log(), CHOICE: torch.full_like(scale_OG, choice), OUTER: outer_O1}


def _table(choice_OG: Tensor) -> Table:
    return Table(torch.tensor(_SETS, device="cpu").to(choice_OG.device), choice_OG)


def _codes(x_OGS: Tensor, choice_OG1: Tensor) -> Tensor:
    codes_OGS = torch.zeros_like(x_OGS, dtype=torch.uint8)
    for choice, values in enumerate(_SETS):
        codes_OGS = torch.where(choice_OG1 == choice, nearest(values).code(x_OGS), codes_OGS)
    return codes_OGS


GRIDS.register("razer")(Razer())

"""Grids whose levels are a table that all groups share: the numbers of a small floating-point type, or any others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from upq.core.levels import Levels, Table
from upq.core.scheme import QuantScheme, to_groups
from upq.grids._base import OUTER, SMALLEST_SCALE, Grid, Params, stored_scale


class Nearest:
    """The code of the value nearest to a number.

    A tie goes to the code that is even, as in rounding to a floating-point type; of two zeros the first is taken.
    """

    def __init__(self, values: Sequence[float]) -> None:
        by_value = {value: code for code, value in reversed(list(enumerate(values)))}  # of equal ones the first
        levels = sorted(by_value)
        codes = [by_value[level] for level in levels]
        edges = []
        for (low, high), upper in zip(pairwise(levels), codes[1:], strict=True):
            edge = torch.tensor((low + high) / 2, device="cpu")  # whatever the usual device is now
            # An edge itself belongs to the level below it; the number before it makes it the upper one's.
            edges.append(edge if upper % 2 else edge.nextafter(torch.tensor(-math.inf, device="cpu")))
        self.levels, self.edges = torch.tensor(levels, device="cpu"), torch.stack(edges)
        self.codes = torch.tensor(codes, dtype=torch.uint8, device="cpu")

    def place(self, x: Tensor) -> Tensor:
        """Index among the sorted values, int32."""
        return torch.bucketize(x.contiguous(), self.edges.to(x.device), out_int32=True)

    def level(self, x: Tensor) -> Tensor:
        return self.levels.to(x.device).index_select(0, self.place(x).flatten()).view(x.shape)

    def code(self, x: Tensor) -> Tensor:
        return self.codes.to(x.device).index_select(0, self.place(x).flatten()).view(x.shape)


nearest = cache(Nearest)


class TableGrid(Grid):
    """Parameter `log_scale` (O, G), and `outer` (O, 1) where scales have it. Gradients pass straight through."""

    uniform: ClassVar[bool] = False
    values: ClassVar[tuple[float, ...]]

    def shared(self, scheme: QuantScheme) -> Levels:
        return Table(torch.tensor(self.values, device="cpu"))

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        peak_OG = to_groups(w_OI.detach().float(), scheme).abs().amax(-1)
        return {"log_scale": (peak_OG / max(self.values)).clamp_min(SMALLEST_SCALE).log()}

    def scale_and_levels(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Levels]:
        scale_OG = stored_scale(params["log_scale"].exp(), scheme, params.get(OUTER))
        levels = self.shared(scheme)
        return scale_OG, levels.to(scale_OG.device)

    def fake(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        scale_OG, _ = self.scale_and_levels(params, scheme)
        x_OGS = to_groups(w_OI.float(), scheme) / scale_OG[..., None]
        inside_OGS = x_OGS.clamp(min(self.values), max(self.values))
        # `x - x.detach()` is exactly 0, so the value is the level's.
        level_OGS = nearest(self.values).level(x_OGS.detach()) + (inside_OGS - inside_OGS.detach())
        return (level_OGS * scale_OG[..., None]).view_as(w_OI)

    @torch.no_grad()
    def codes(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        scale_OG, _ = self.scale_and_levels(params, scheme)
        return nearest(self.values).code(to_groups(w_OI.float(), scheme) / scale_OG[..., None]).view_as(w_OI)

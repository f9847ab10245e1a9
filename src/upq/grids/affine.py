"""Asymmetric uniform grid: (code - zero)·scale with an integer zero point, min-max start (the field's plain W2/W4)."""

from __future__ import annotations

import torch
from torch import Tensor

from upq.core.scheme import QuantScheme, to_groups
from upq.grids._base import GRIDS, SMALLEST_SCALE, Grid, Params, stored_scale


class Affine(Grid):
    """Parameters `log_scale` and `zero` (O, G), both learnable; roundings have straight-through gradients."""

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        low_OG, high_OG = to_groups(w_OI.detach().float(), scheme).aminmax(dim=-1)
        # The range always holds 0, so that zero stays within the codes.
        low_OG, high_OG = low_OG.clamp_max(0), high_OG.clamp_min(0)
        scale_OG = ((high_OG - low_OG) / (scheme.levels - 1)).clamp_min(SMALLEST_SCALE)
        return {"log_scale": scale_OG.log(), "zero": -low_OG / scale_OG}

    def fake(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        code_OGS, zero_OG, scale_OG = self._code(w_OI, params, scheme)
        return ((code_OGS - zero_OG[..., None]) * scale_OG[..., None]).view_as(w_OI)

    @torch.no_grad()
    def codes(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        return self._code(w_OI, params, scheme)[0].to(torch.uint8).view_as(w_OI)

    def scale_and_zero(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        zero_OG = round_ste(params["zero"]).clamp(0, scheme.levels - 1)
        return stored_scale(params["log_scale"].exp(), scheme), zero_OG

    def _code(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor]:
        scale_OG, zero_OG = self.scale_and_zero(params, scheme)
        x_OGS = to_groups(w_OI.float(), scheme) / scale_OG[..., None] + zero_OG[..., None]
        return round_ste(x_OGS).clamp(0, scheme.levels - 1), zero_OG, scale_OG


def round_ste(x: Tensor) -> Tensor:
    """Round; the gradient passes straight through. `x - x.detach()` is exactly 0, so the value is exact."""
    return x.round().detach() + (x - x.detach())


GRIDS.register("affine")(Affine())

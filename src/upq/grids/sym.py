"""Symmetric integers with a zero level, -2^(b-1) … 2^(b-1)-1 times the scale: the grid of most integer engines.

At 2 bits these are -2, -1, 0, 1: what compressed-tensors, GPTQ and Gemma call int2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upq.core.scheme import QuantScheme, to_groups
from upq.grids._base import GRIDS, SMALLEST_SCALE, Params, stored_scale
from upq.grids._least_squares import Stepped
from upq.grids.affine import Affine


class Sym(Stepped, Affine):
    """Parameter `log_scale` (O, G); the zero point is 2^(b-1) everywhere."""

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        peak_OG = to_groups(w_OI.detach().float(), scheme).abs().amax(-1)
        scale_OG = peak_OG / ((scheme.levels - 1) / 2)  # the largest weight is half a step from the last level
        return {"log_scale": scale_OG.clamp_min(SMALLEST_SCALE).log()}

    def at(self, scale_OG: Tensor, scheme: QuantScheme) -> Params:
        return {"log_scale": scale_OG.log()}

    def zero(self, scheme: QuantScheme) -> float:
        return scheme.levels / 2

    def scale_and_zero(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        scale_OG = stored_scale(params["log_scale"].exp(), scheme)
        return scale_OG, torch.full_like(scale_OG, self.zero(scheme))


GRIDS.register("sym")(Sym())

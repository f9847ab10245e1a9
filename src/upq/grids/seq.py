"""Stretched elastic quantisation (ParetoQ, arXiv 2502.02631): 2^b balanced levels at half integers, no zero level.

    u = W / Δ,   n = 2^(b-1),   q = (floor(n·u) + ½) / n clipped to ±(n-½)/n,   Ŵ = Δ·q

At 2 bits the levels are Δ·{-¾, -¼, ¼, ¾}. `floor(x) + ½` equals the paper's `round(x - ½) + ½` except on ties, where
half-to-even rounding would break the law that the 2-bit code is the top two bits of the 4-bit code for the same Δ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from upq.core.scheme import QuantScheme, to_groups
from upq.grids._base import GRIDS, SMALLEST_SCALE, Params, stored_scale, stretches_of_rows
from upq.grids._least_squares import Stepped
from upq.kernels import training


class _FakeSeq(torch.autograd.Function):
    """Ŵ with straight-through gradients; keeps W and Δ and recomputes u, so there is no second copy of W."""

    @staticmethod
    def forward(ctx: Any, w_OGS: Tensor, delta_OG: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(w_OGS, delta_OG)
        ctx.n = n
        scale_OG = delta_OG / n
        if training.takes(w_OGS, scale_OG):
            return training.fake_seq(w_OGS, scale_OG, n)
        fake_OGS = torch.empty_like(w_OGS)
        for rows in stretches_of_rows(w_OGS):
            delta = delta_OG[rows, :, None]
            torch.mul(delta, _q(w_OGS[rows] / delta, n), out=fake_OGS[rows])
        return fake_OGS

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (g_OGS,) = grads
        w_OGS, delta_OG = ctx.saved_tensors
        # LSQ's gradient scale over the group (ParetoQ's released code takes the whole matrix instead).
        scale = 1 / math.sqrt(w_OGS.shape[-1] * max(ctx.n - 1, 1))
        # ParetoQ's clip at 0.99 for 2 bits; scaled with the level spacing so that 8 bits keep their outer levels.
        bound, scale_OG = 1 - 0.02 / ctx.n, delta_OG / ctx.n
        if training.takes(g_OGS, w_OGS, scale_OG):
            # In steps; a power of two, so exact.
            of_steps = float(torch.tensor(bound) * ctx.n)
            return *training.seq_gradient(g_OGS, w_OGS, scale_OG, ctx.n, bound=of_steps, factor=scale), None
        d_w_OGS, d_delta_OG = torch.empty_like(w_OGS), torch.empty_like(delta_OG)
        for rows in stretches_of_rows(w_OGS):
            g, u = g_OGS[rows], w_OGS[rows] / delta_OG[rows, :, None]
            inside, q = u.abs() < bound, _q(u, ctx.n)
            d_delta_OG[rows] = scale * (g * torch.where(inside, q - u, q)).sum(-1)
            torch.mul(g, inside, out=d_w_OGS[rows])
        return d_w_OGS, d_delta_OG, None


class Seq(Stepped):
    """Parameter `log_delta` (O, G): Δ stays positive by construction and its learning rate is relative."""

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        delta_OG = to_groups(w_OI.detach().float(), scheme).abs().amax(-1)
        return {"log_delta": delta_OG.clamp_min(SMALLEST_SCALE * scheme.levels / 2).log()}

    def fake(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        n = scheme.levels // 2
        scale_OG, _ = self.scale_and_zero(params, scheme)
        delta_OG = scale_OG * n  # a power of two: exact
        fake_OGS: Tensor = _FakeSeq.apply(to_groups(w_OI.float(), scheme), delta_OG, n)  # type: ignore[no-untyped-call]
        return fake_OGS.view_as(w_OI)

    @torch.no_grad()
    def codes(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        n = scheme.levels // 2
        scale_OG, _ = self.scale_and_zero(params, scheme)
        q_OGS = _q(to_groups(w_OI.float(), scheme) / (scale_OG * n)[..., None], n)
        return (q_OGS * n + (n - 0.5)).to(torch.uint8).view_as(w_OI)

    def scale_and_zero(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        # What is stored is Δ/n.
        scale_OG = stored_scale(params["log_delta"].exp() / (scheme.levels // 2), scheme)
        return scale_OG, torch.full_like(scale_OG, self.zero(scheme))

    def at(self, scale_OG: Tensor, scheme: QuantScheme) -> Params:
        return {"log_delta": (scale_OG * (scheme.levels // 2)).log()}

    def zero(self, scheme: QuantScheme) -> float:
        return (scheme.levels - 1) / 2


def _q(u: Tensor, n: int) -> Tensor:
    return (u * n).floor_().clamp_(-n, n - 1).add_(0.5).div_(n)


GRIDS.register("seq")(Seq())

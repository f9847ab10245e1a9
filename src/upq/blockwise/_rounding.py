"""Learned rounding: each weight goes to one of the two levels that enclose it, and a variable says to which.

AdaRound's rectified sigmoid (arXiv 2004.10568, used block by block in BRECQ, arXiv 2102.05426, equation 16):

    Ŵ = (lower + h(V) - zero) · scale,   h(V) = clip(σ(V)(ζ - γ) + γ, 0, 1),   ζ = 1.1, γ = -0.1

V starts where h is the weight's own place between its levels, so the soft weight is the weight itself; it is hardened
by a penalty or step by step (TesseraQ, arXiv 2410.19103). What is judged and kept is the hard weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from upq.blockwise._base import (
    BlockTask,
    Calibration,
    Method,
    ScaleStart,
    Work,
    start_scales,
    start_work,
)
from upq.blockwise._reconstruct import Groups, reconstruct, reconstruct_memory, reconstruct_work
from upq.core.config import Strict
from upq.core.scheme import QuantScheme, to_groups
from upq.grids import GRIDS, ZERO, Params, stretches_of_rows
from upq.model.sizes import Bytes, Sizes
from upq.nn.fake_quant import Solution

STRETCH, SHIFT = 1.2, -0.1  # ζ - γ and γ
# TesseraQ's shares of the weights that are still soft, after each of twenty hardenings.
SOFT = (
    0.8, 0.65, 0.5, 0.43, 0.38, 0.34, 0.3, 0.27, 0.24, 0.21,
    0.18, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04, 0.02, 0.01, 0.005,
)  # fmt: skip
# A latent keeps this distance from its lower level, the middle and its upper level: the grid rounds it to the level
# that was learned, and a later bracket finds the same two levels.
_MARGIN = 1 / 64


class Rounding(Strict):
    """Settings of learned rounding."""

    scale: ScaleStart = "mse"
    relative: bool = False  # each token's error over its output's own size
    iterations: int = Field(400, ge=1)
    batch_size: int = Field(4, ge=1)
    lr: float = Field(1e-1, gt=0)  # of V, whose span from level to level is 4.8
    harden: Literal["progressive", "penalty"] = "progressive"
    penalty: float = Field(0.01, ge=0)  # of `penalty`: λ, beside an error summed over channels
    warmup: float = Field(0.2, ge=0, lt=1)  # share of the steps without penalty
    beta_start: float = Field(20.0, ge=1)  # the penalty's exponent falls linearly
    beta_end: float = Field(2.0, ge=1)
    learn_scale: bool = True  # of dequantisation: which levels enclose a weight stays as it is
    scale_lr: float = Field(3e-3, gt=0)


@dataclass(frozen=True)
class Bracket:
    """Where weights (O, I) lie between levels: `lower` and `lower + 1` enclose each, or are the nearest two."""

    lower_OI: Tensor  # uint8, at most the last level but one
    fraction_OI: Tensor  # float32: 0 at the lower level, 1 at the upper
    up_OI: Tensor  # bool: which of the two the grid rounds to


@torch.no_grad()
def bracket(w_OI: Tensor, params: Params, scheme: QuantScheme) -> Bracket:
    """Of any grid of evenly spaced levels."""
    grid = GRIDS.get(scheme.grid)
    scale_OG, zero_OG = grid.scale_and_zero(params, scheme)
    x_OI = (to_groups(w_OI.float(), scheme) / scale_OG[..., None] + zero_OG[..., None]).view_as(w_OI)
    lower_OI = x_OI.floor().clamp_(0, scheme.levels - 2)
    up_OI = grid.freeze(w_OI, params, scheme).codes_OI > lower_OI
    return Bracket(lower_OI.to(torch.uint8), (x_OI - lower_OI).clamp_(0, 1), up_OI)


def start_of(found: Bracket) -> Tensor:
    """V (O, I) float32 with h(V) the fraction, and V ≥ 0 where the grid rounds up: a tie is the grid's to decide."""
    v_OI = ((found.fraction_OI - SHIFT) / (STRETCH + SHIFT - found.fraction_OI)).log_()
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(found.up_OI, v_OI.clamp_min(0), v_OI.clamp_max(-tiny))


def share_up(v: Tensor) -> Tensor:
    """h(V): 0 at the lower level, 1 at the upper."""
    return (v.sigmoid() * STRETCH + SHIFT).clamp(0, 1)


class _Soft(torch.autograd.Function):
    """`(lower + h(V) - zero) · scale` of groups (O, G, S), keeping V and the lower levels."""

    @staticmethod
    def forward(ctx: Any, v_OGS: Tensor, lower_OGS: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        ctx.save_for_backward(v_OGS, lower_OGS, scale_OG, zero_OG)
        soft_OGS = torch.empty_like(v_OGS)
        for rows in stretches_of_rows(v_OGS):
            place = share_up(v_OGS[rows]) + lower_OGS[rows]
            torch.mul(place.sub_(zero_OG[rows, :, None]), scale_OG[rows, :, None], out=soft_OGS[rows])
        return soft_OGS

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (v_OGS, lower_OGS, scale_OG, zero_OG), (g_OGS,) = ctx.saved_tensors, grads
        d_v_OGS, d_scale_OG = torch.empty_like(v_OGS), torch.empty_like(scale_OG)
        for rows in stretches_of_rows(v_OGS):
            s, g = v_OGS[rows].sigmoid(), g_OGS[rows]
            raw = s * STRETCH + SHIFT
            inside = (raw > 0) & (raw < 1)
            place = raw.clamp(0, 1) + lower_OGS[rows] - zero_OG[rows, :, None]
            d_scale_OG[rows] = (g * place).sum(-1)
            slope = s * (1 - s) * (STRETCH * scale_OG[rows, :, None])
            torch.mul(g, slope * inside, out=d_v_OGS[rows])
        return d_v_OGS, None, d_scale_OG, None


def soft(v_OI: Tensor, lower_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    """The weight (O, I) between its levels, differentiable with respect to V and the scale."""
    shape = (*scale_OG.shape, -1)
    found: Tensor = _Soft.apply(v_OI.reshape(shape), lower_OI.view(shape), scale_OG, zero_OG)  # type: ignore[no-untyped-call]
    return found.view_as(v_OI)


def exponent(done: float, *, warmup: float, start: float, end: float) -> float | None:
    """β of the penalty, after this share of the steps; None before `warmup`."""
    if done < warmup:
        return None
    return start + (end - start) * (done - warmup) / (1 - warmup)


def penalty_of(v: Tensor, beta: float) -> Tensor:
    """Σ 1 - |2h - 1|^β: zero where every weight is on a level."""
    return (1 - (2 * share_up(v) - 1).abs().pow(beta)).sum()


@torch.no_grad()
def harden(v: Tensor, share: float) -> Tensor:
    """bool: the elements of V that leave `share` of them soft, those farthest from the middle. Hard ones stay so."""
    distance = (share_up(v) - 0.5).abs()
    distance[v.isinf()] = 1.0
    rest = int(share * v.numel())
    if not rest:
        return torch.ones_like(v, dtype=torch.bool)
    return distance > distance.flatten().kthvalue(rest).values


@dataclass(frozen=True)
class Learned:
    """One matrix's rounding variable: V, or what V is made of."""

    offset_OI: Tensor  # part of V that harden() may take to ±∞
    factors: tuple[Tensor, ...] = ()  # A (O, r) and B (r, I), whose product is added to it

    def v(self) -> Tensor:
        return self.offset_OI + self.factors[0] @ self.factors[1] if self.factors else self.offset_OI

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.factors or (self.offset_OI,)


def solve(
    task: BlockTask, scheme: QuantScheme, config: Rounding, learned_from: Callable[[str, Tensor], Learned]
) -> dict[str, Solution]:
    """Learn the rounding of every weight of a block. `learned_from` makes of a name and V's start what learns."""
    grid, weights = GRIDS.get(scheme.grid), task.weights()
    params = start_scales(task, scheme, config.scale, relative=config.relative)
    schemes = {name: task.scheme(name, scheme) for name in weights}
    brackets = {name: bracket(w_OI, params[name], schemes[name]) for name, w_OI in weights.items()}
    learned = {name: learned_from(name, start_of(found)) for name, found in brackets.items()}
    lowers = {name: found.lower_OI for name, found in brackets.items()}
    del brackets, weights
    params = {name: {key: value.clone() for key, value in each.items()} for name, each in params.items()}
    scales = [value for each in params.values() for key, value in each.items() if key != ZERO]
    leaves = [leaf for each in learned.values() for leaf in each.leaves]
    for leaf in (*leaves, *(scales if config.learn_scale else ())):
        leaf.requires_grad_()

    def quantised() -> dict[str, Tensor]:
        return {
            name: soft(each.v(), lowers[name], *grid.scale_and_zero(params[name], schemes[name]))
            for name, each in learned.items()
        }

    @torch.no_grad()
    def hard() -> dict[str, Tensor]:
        return {name: solutions(name).qtensor().dequantize() for name in learned}

    @torch.no_grad()
    def solutions(name: str) -> Solution:
        plain = {key: value.detach() for key, value in params[name].items()}
        v_OI = learned[name].v()
        return Solution(_latent(v_OI, lowers[name], plain, schemes[name]), plain, schemes[name])

    channels = task.targets_NTH.shape[2:].numel()

    def penalty(done: float) -> Tensor | None:
        beta = exponent(done, warmup=config.warmup, start=config.beta_start, end=config.beta_end)
        if beta is None or not config.penalty:
            return None
        # The error here is a mean over channels, where λ belongs to a sum.
        total = torch.stack([penalty_of(each.v(), beta) for each in learned.values()]).sum()
        return total * (config.penalty / channels)

    hardened = -1

    @torch.no_grad()
    def before_step(done: float) -> None:
        nonlocal hardened
        stage = int(done * len(SOFT))
        if stage > hardened:
            hardened = stage
            for each in learned.values():
                v_OI = each.v()
                now = harden(v_OI, SOFT[stage])
                each.offset_OI[now] = torch.where(v_OI >= 0, torch.inf, -torch.inf)[now]

    progressive = config.harden == "progressive"
    offsets = {name: each.offset_OI.detach().clone() for name, each in learned.items()} if progressive else {}
    groups: Groups = [{"params": leaves, "lr": config.lr}]
    if config.learn_scale:
        groups.append({"params": scales, "lr": config.scale_lr})
    before, after = reconstruct(
        task,
        quantised,
        groups,
        relative=config.relative,
        iterations=config.iterations,
        batch_size=config.batch_size,
        hard=hard,
        penalty=None if progressive else penalty,
        before_step=before_step if progressive else None,
    )
    if after == before:  # the start was kept; what was hardened is none of what learns
        for name, value in offsets.items():
            with torch.no_grad():
                learned[name].offset_OI.copy_(value)
    return {name: solutions(name) for name in learned}


def _latent(v_OI: Tensor, lower_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
    """A weight that the grid rounds to the level V stands for, as near to the soft weight as that leaves it."""
    scale_OG, zero_OG = GRIDS.get(scheme.grid).scale_and_zero(params, scheme)
    h_OI = share_up(v_OI)
    inner = 0.5 - _MARGIN
    place_OI = torch.where(v_OI >= 0, h_OI.clamp(1 - inner, 1 - _MARGIN), h_OI.clamp(_MARGIN, inner)) + lower_OI
    return ((to_groups(place_OI, scheme) - zero_OG[..., None]) * scale_OG[..., None]).view_as(v_OI)


class LearnedRounding(Method):
    """What methods of learned rounding have in common; `solve` says of what form the variable is."""

    config: Rounding
    needs_inputs = True
    learns = True
    between_levels = True

    @property
    def cost(self) -> float:
        return 3.0 * self.config.iterations * self.config.batch_size

    def memory(self, sizes: Sizes, calibration: Calibration) -> Bytes:
        config = self.config
        learning = reconstruct_memory(
            sizes, calibration, batch_size=config.batch_size, iterations=config.iterations, weights_kept=1
        )
        return learning + sizes.matrices() * 0.25

    def work(self, sizes: Sizes, calibration: Calibration) -> Work:
        config = self.config
        return start_work(sizes, calibration, config.scale) + reconstruct_work(
            sizes, calibration, batch_size=config.batch_size, iterations=config.iterations, moved=200
        )

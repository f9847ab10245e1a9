"""MS-EDEN of Quartet II (arXiv 2601.22813): products of a backward pass on NVFP4 operands, without bias. Emulated.

Both operands are turned by one random Hadamard matrix along the axis that the product sums over, so the turns cancel.
Each is rounded to the nearest level, and a factor for each group that was turned, S = <x, x> / <x, q>, makes up for
what that takes away. S goes into the scales of 16 numbers each, which are rounded to E4M3 at random: of the two
neighbours either, with the mean S·scale. Constants are those of the authors' code.

Shape suffixes: K = the axis summed over, R and C = rows of the two operands, N = groups that are turned, D = their
width, B = blocks in one, T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from upq.core.hadamard import hadamard
from upq.core.levels import E2M1
from upq.core.scales import SCALE_TYPES
from upq.core.scramble import scramble
from upq.grids._table import nearest

BLOCK = 16  # numbers that share a scale
TURNED = 128  # numbers that are turned together, and have one S
_SHARE = 17 / 16 * 0.93  # of a block's range
_TOP = 255.99  # the largest scale before S: E4M3's own largest is 448
_E4M3 = SCALE_TYPES["e4m3"]


class Draws:
    """Random numbers as a function of step, micro-batch, process and place alone: a resumed training draws the same."""

    def __init__(self) -> None:
        self._now = (0, 0, 0)

    def begin(self, step: int, micro_batch: int, process: int) -> None:
        """What the backward pass that comes next is of."""
        self._now = (step, micro_batch, process)

    def generator(self, place: int, device: torch.device) -> torch.Generator:
        value = np.zeros(1, dtype=np.uint64)
        for part in (*self._now, place):
            value = scramble(value + np.uint64(part), 0)
        return torch.Generator(device).manual_seed(int(value[0] >> np.uint64(1)))


@dataclass(frozen=True)
class Backward:
    """The two products of a linear's backward pass. `place` is the linear's own number, and room for its experts'."""

    draws: Draws
    place: int

    def at(self, part: int) -> Backward:
        """Of one of the matrices in a linear, as experts are."""
        return Backward(self.draws, self.place + part + 1)

    def of_input(self, grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
        """An estimate (T, I) of grad · Ŵ, in the type of `grad`."""
        return product(grad_TO, weight_OI.t(), self.draws.generator(2 * self.place, grad_TO.device))

    def of_weight(self, grad_TO: Tensor, x_TI: Tensor) -> Tensor:
        """An estimate (O, I) of gradᵀ · x, in the type of `grad`."""
        return product(grad_TO.t(), x_TI.t(), self.draws.generator(2 * self.place + 1, grad_TO.device))


def product(a_RK: Tensor, b_CK: Tensor, generator: torch.Generator) -> Tensor:
    """An estimate of a · bᵀ, (R, C), in the type of `a`; computed in float32. K is filled up with zeros."""
    fill = -a_RK.shape[1] % TURNED
    turn_DD = turn(generator)
    each = (turned(F.pad(operand.float(), (0, fill)), turn_DD) for operand in (a_RK, b_CK))
    estimate_RK, estimate_CK = (estimate(operand, generator) for operand in each)
    return (estimate_RK @ estimate_CK.t()).to(a_RK.dtype)


def turn(generator: torch.Generator) -> Tensor:
    """(D, D) float32, orthogonal: random signs, then Hadamard's matrix."""
    signs_D = torch.randint(0, 2, (TURNED, 1), generator=generator, device=generator.device) * 2.0 - 1
    return signs_D * _hadamard().to(generator.device)


def turned(x_RK: Tensor, turn_DD: Tensor) -> Tensor:
    return (x_RK.reshape(len(x_RK), -1, len(turn_DD)) @ turn_DD).reshape(x_RK.shape)


def estimate(x_RK: Tensor, generator: torch.Generator) -> Tensor:
    """NVFP4 numbers (R, K), float32, of numbers that have been turned. Their mean over turns and draws is x.

    Exactly so as D grows; at 128 the mean of 64 estimates still has an eighth of the error of one.
    """
    outer = (x_RK.abs().max() / (max(E2M1) * _TOP)).clamp_min(torch.finfo(torch.float32).tiny)
    x_RNBS = (x_RK / outer).view(len(x_RK), -1, TURNED // BLOCK, BLOCK)
    scale_RNB = _E4M3.decode(_E4M3.encode(x_RNBS.abs().amax(-1) * (_SHARE / max(E2M1))))
    level_RNBS = nearest(E2M1).level(x_RNBS / scale_RNB[..., None])
    q_RNBS = level_RNBS * scale_RNB[..., None]
    kept_RN = (x_RNBS * q_RNBS).sum((-2, -1))
    factor_RN = torch.where(kept_RN > 0, x_RNBS.square().sum((-2, -1)) / kept_RN, 1.0)
    stored_RNB = at_random(scale_RNB * factor_RN[..., None], generator)
    return (level_RNBS * stored_RNB[..., None]).view_as(x_RK) * outer


def at_random(scales: Tensor, generator: torch.Generator) -> Tensor:
    """One of the two E4M3 numbers around each, with its mean; below 448."""
    exponent = (torch.frexp(scales)[1] - 1).clamp_min(-6)
    step = torch.ldexp(torch.ones_like(scales), exponent - 3)
    steps = scales / step
    up = torch.rand(scales.shape, generator=generator, device=scales.device) < steps.frac()
    return ((steps.floor() + up) * step).clamp_max(_E4M3.largest)


@cache
def _hadamard() -> Tensor:
    return hadamard(TURNED).float()

"""A weight as integers of 4 or 8 bits that are symmetric around zero, with scales: how XNNPACK's users hold weights.

    (code - zero)·scale = k·d

with the whole numbers k of _integers.py where 8 bits hold them; else code - middle stands for k, `scale` for d, and
shift = (middle - zero)·scale is what each number lacks. Then a product lacks the sum of its inputs times the shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upq.exports import _integers as integers
from upq.exports._source import Weight


@dataclass(frozen=True, slots=True)
class Carried:
    """How a weight is held."""

    bits: int  # of an integer: 4 or 8
    middle: int | None = None  # what is taken from a code; None: the integers are k

    @property
    def shifted(self) -> bool:
        return self.middle is not None

    @property
    def limits(self) -> tuple[int, int]:
        half = 1 << (self.bits - 1)
        return -half, half - 1


def carried(weight: Weight) -> Carried | None:
    """None for a weight that stays dense: not quantised, or of levels that no such integers are."""
    if weight.scheme is None:
        return None
    found = integers.bits(weight) if integers.misfit(weight, torch.float32) is None else None
    if found is not None and found <= 8:
        return Carried(4 if found <= 4 else 8)
    middle = Carried(8, 1 << (weight.scheme.bits - 1))
    scale_OG, shift_OG = scale_shift(weight, middle)
    if scale_OG.shape[1] > 1:
        return None
    for start, stop in weight.chunks():
        q = weight.qtensor(start, stop)
        codes_OI = _codes(weight, middle, start, stop).float()
        if not torch.equal(codes_OI * scale_OG[start:stop] + shift_OG[start:stop], q.dequantize()):
            return None
    return middle


def codes(weight: Weight, held: Carried) -> Tensor:
    """The integers, int8 (O, I)."""
    return torch.cat([_codes(weight, held, start, stop) for start, stop in weight.chunks()])


def scale_shift(weight: Weight, held: Carried) -> tuple[Tensor, Tensor]:
    """Scales and shifts, float32 (O, G)."""
    scale_OG, zero_OG = (each.float() for each in weight.scale_zero())
    if held.middle is None:
        return scale_OG / integers.step(zero_OG), torch.zeros_like(scale_OG)
    return scale_OG, (held.middle - zero_OG) * scale_OG


def _codes(weight: Weight, held: Carried, start: int, stop: int) -> Tensor:
    q = weight.qtensor(start, stop)
    if held.middle is None:
        return integers.integers(q).to(torch.int8)
    return (q.codes_OI.to(torch.int16) - held.middle).to(torch.int8)

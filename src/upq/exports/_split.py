"""Grid `splitquant` as what it stands for: the sum of three matrices of 4-bit integers, each with one scale a tensor.

A weight is in one of the three, and the others have a zero there, so the sum is the weight, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from upq import kernels
from upq.core.errors import UPQError
from upq.core.levels import Table
from upq.core.scheme import QuantScheme
from upq.exports._base import Options
from upq.exports._source import Source, Weight
from upq.grids.splitquant import CODES, PARTS

CARRIER = f"{PARTS} u4"


class SplitOptions(Options):
    # 3: a linear becomes three, for engines that know one scale a tensor. Of grid `splitquant` alone.
    split: int | None = Field(None, ge=PARTS, le=PARTS)


@dataclass(frozen=True, slots=True)
class Part:
    """`scale · (code - zero)`; both are exact in float32, as is their product."""

    weight: Weight
    index: int
    scale: float
    zero: int

    def packed(self) -> Iterable[Tensor]:
        """Two codes a byte, the first in the low half; the rows follow each other. uint8 (rows, I/2) at a time."""
        for start, stop in self.weight.chunks():
            codes_OI = self.weight.qtensor(start, stop).codes_OI
            own_OI = torch.where(codes_OI // CODES == self.index, codes_OI % CODES, self.zero)
            yield kernels.pack(own_OI.to(torch.uint8), 4)


def splits(scheme: QuantScheme | None) -> bool:
    return scheme is not None and scheme.grid == "splitquant"


def check(source: Source) -> None:
    """Refuse in one line what `split` has no meaning for."""
    for weight in map(source.weights.__getitem__, sorted(source.linears)):
        if weight.scheme is not None and not splits(weight.scheme):
            raise UPQError(
                f"{source.path}: split={PARTS} writes grid splitquant, and {weight.name} is on {weight.scheme.grid}, "
                "whose scales are not one a tensor; leave split out, or quantise with that grid"
            )
        if weight.scheme is not None and weight.shape[1] % 2:
            raise UPQError(f"{source.path}: split={PARTS} packs two codes a byte, and {weight.name} has an odd width")


def bytes_of(weight: Weight) -> int:
    """Codes, and a scale and a zero point of each part."""
    return PARTS * (weight.numel // 2 + 4 + 1)


def parts(weight: Weight) -> list[Part]:
    q = weight.qtensor(0, 1)  # the levels of all rows are the same
    assert isinstance(q.levels, Table)
    levels_PC = (q.levels.values[0, 0] * q.scales()[0]).view(PARTS, CODES)
    found = []
    for index, levels_C in enumerate(levels_PC):
        scale = (levels_C[1] - levels_C[0]).item()
        found.append(Part(weight, index, scale, round(-levels_C[0].item() / scale)))
    return found

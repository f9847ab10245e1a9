"""The scheme of a quantised weight, and its value.

Shape suffixes: O = out features, I = in features, G = groups in a row, S = group size (I = G * S).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.levels import Levels, Uniform
from upq.core.scales import SCALE_TYPES, ScaleType

PER_CHANNEL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """Weight-only scheme. Frozen and hashable: it keys caches and is written verbatim to manifest and config.

    `group_size` counts input features that share a scale; -1 (per channel) is one scale for a whole row.
    """

    bits: int
    group_size: int = PER_CHANNEL
    grid: str = "seq"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        # Values come from files too: 2.0 would pass every comparison below, and a list is no name.
        if not (type(self.bits) is type(self.group_size) is int and type(self.grid) is type(self.scale_dtype) is str):
            raise UPQError(f"bits and group_size must be integers, grid and scale_dtype names, got {self}")
        if not 2 <= self.bits <= 8:
            raise UPQError(f"bits must be in 2..8, got {self.bits}")
        if self.group_size != PER_CHANNEL and (self.group_size <= 0 or self.group_size % 8):
            raise UPQError(f"group_size must be -1 (per channel) or a positive multiple of 8, got {self.group_size}")
        if self.scale_dtype not in SCALE_TYPES:
            raise UPQError(f"scale_dtype must be one of {', '.join(SCALE_TYPES)}, got {self.scale_dtype!r}")

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def scale(self) -> ScaleType:
        return SCALE_TYPES[self.scale_dtype]

    @property
    def scale_torch_dtype(self) -> torch.dtype:
        return self.scale.dtype

    def groups(self, in_features: int) -> int:
        """Number of groups G in a row of `in_features` weights."""
        if self.group_size == PER_CHANNEL:
            return 1
        if in_features % self.group_size:
            fits = math.gcd(in_features, self.group_size)
            remedy = f"group_size={fits} or -1 (per channel)" if fits >= 8 else "group_size=-1 (per channel)"
            raise UPQError(f"in_features {in_features} is not a multiple of group_size {self.group_size}; try {remedy}")
        return in_features // self.group_size


@dataclass(frozen=True, slots=True)
class QTensor:
    """Canonical quantised weight: `w[o, g*S + s] = level(code[o, g*S + s]) * scale[o, g]`, in float32.

    With code books a level belongs to the codes of a whole vector (levels.Books).

    The tensor value that crosses stages and formats; kernel layouts are derived from it and never saved.
    """

    codes_OI: Tensor  # uint8, 0 <= code < scheme.levels
    scale_OG: Tensor  # as stored, in scheme.scale.dtype; `scales` has what they stand for
    levels: Levels
    scheme: QuantScheme
    outer_O1: Tensor | None = None  # float32: what all scales of a row are multiplied with, where their type has that

    @property
    def zero_OG(self) -> Tensor:
        """Zero points, float32, of evenly spaced levels. SEQ puts its own half way between two (1.5 at 2 bits)."""
        assert isinstance(self.levels, Uniform), "levels that are not evenly spaced have no zero point"
        zero = self.levels.zero
        if isinstance(zero, Tensor):
            return zero
        return torch.full(self.scale_OG.shape, zero, dtype=torch.float32, device=self.scale_OG.device)

    def scales(self) -> Tensor:
        """The scales (O, G), positive, float32."""
        inner_OG = self.scheme.scale.decode(self.scale_OG)
        return inner_OG if self.outer_O1 is None else inner_OG * self.outer_O1

    def dequantize(self) -> Tensor:
        """The represented weight (O, I) in float32.

        Exact: a level of few bits times an 11-bit scale fits 24 bits. Only sums of code books are rounded.
        """
        o, i = self.codes_OI.shape
        levels_OGS = self.levels.of(self.codes_OI.view(o, self.scale_OG.shape[1], -1))
        return levels_OGS.mul_(self.scales()[..., None]).view(o, i)

    def cpu(self) -> QTensor:
        """The same, outside the memory of an accelerator."""
        outer_O1 = None if self.outer_O1 is None else self.outer_O1.cpu()
        return QTensor(self.codes_OI.cpu(), self.scale_OG.cpu(), self.levels.to("cpu"), self.scheme, outer_O1)


def to_groups(w_OI: Tensor, scheme: QuantScheme) -> Tensor:
    """View (O, I) as (O, G, S)."""
    o, i = w_OI.shape
    return w_OI.reshape(o, scheme.groups(i), -1)

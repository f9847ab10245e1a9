"""What codes stand for before the scale: levels that are evenly spaced, or a table of them.

Shape suffixes: O = out features, G = groups in a row, S = group size, L = levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Uniform:
    """`code - zero`."""

    zero: Tensor | float  # (O, G), or the one that all groups share

    def of(self, codes_OGS: Tensor) -> Tensor:
        """Levels of codes, float32."""
        # In place: the float32 copy of a head can be a gigabyte, and one is enough.
        return codes_OGS.float().sub_(self.zero.float()[..., None] if isinstance(self.zero, Tensor) else self.zero)

    def to(self, device: torch.device | str) -> Uniform:
        return Uniform(self.zero.to(device)) if isinstance(self.zero, Tensor) else self

    def rows(self, rows: slice | Tensor) -> Uniform:
        return Uniform(self.zero[rows]) if isinstance(self.zero, Tensor) else self


@dataclass(frozen=True, slots=True)
class Table:
    """`values[code]`, float32: (L,) for all groups, (O, G, L) for each its own, or (K, L) of which each takes one."""

    values: Tensor
    choice_OG: Tensor | None = None  # uint8: which of K

    def of(self, codes_OGS: Tensor) -> Tensor:
        """Levels of codes, float32; differentiable with respect to the values."""
        if self.values.dim() == 3:
            return self.values.gather(-1, codes_OGS.long())
        place_OGS = codes_OGS.int()
        if self.choice_OG is not None:
            place_OGS += self.choice_OG.int()[..., None] * self.values.shape[1]
        return self.values.flatten().index_select(0, place_OGS.flatten()).view(codes_OGS.shape)

    def to(self, device: torch.device | str) -> Table:
        return Table(self.values.to(device), None if self.choice_OG is None else self.choice_OG.to(device))

    def rows(self, rows: slice | Tensor) -> Table:
        values = self.values[rows] if self.values.dim() == 3 else self.values
        return Table(values, None if self.choice_OG is None else self.choice_OG[rows])


# A code of AQLM stands for eight weights at once, of books that belong to a matrix: it will be a third kind.
Levels = Uniform | Table


def minifloat(exponent: int, mantissa: int, bias: int) -> tuple[float, ...]:
    """The values of a floating-point type without infinities, by code: sign, exponent, mantissa."""
    positive = []
    for code in range(1 << (exponent + mantissa)):
        field, fraction = code >> mantissa, code & (1 << mantissa) - 1
        whole = (fraction + (1 << mantissa if field else 0)) / (1 << mantissa)
        positive.append(whole * 2.0 ** (max(field, 1) - bias))
    return (*positive, *(-value for value in positive))


E2M1 = minifloat(2, 1, 1)  # 0, .5, 1, 1.5, 2, 3, 4, 6
E3M2 = minifloat(3, 2, 3)  # … 28

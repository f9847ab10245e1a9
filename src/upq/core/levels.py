"""What codes stand for before the scale: levels that are evenly spaced, a table of them, or the rows of code books.

Shape suffixes: O = out features, G = groups in a row, S = group size, L = levels; of code books M = books, K = rows of
a book, V = weights that a row stands for, J = such vectors in a row of the weight.
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


@dataclass(frozen=True, slots=True)
class Books:
    """Code books (AQLM, arXiv 2401.06118): V weights side by side are the sum of one row of each of M books.

    A code is a field of bits: the V codes of a vector, lowest bits first, are M numbers of log2(K) bits, the rows of
    book 0, 1, … So codes of `bits` bits need M = V·bits / log2(K) books, and with K = 256 a packed row is the bytes of
    the rows themselves.
    """

    values: Tensor  # (M, K, V), float32

    def of(self, codes_OGS: Tensor) -> Tensor:
        """Levels of codes, float32, the books added in their order; differentiable with respect to the values."""
        return self.sums(self.rows_of(codes_OGS.flatten(1))).view(codes_OGS.shape)

    def sums(self, rows_OJM: Tensor) -> Tensor:
        """The vectors (O, J, V) that are sums of these rows."""
        books, k, v = self.values.shape
        flat, total = self.values.reshape(books * k, v), None
        for m in range(books):
            chosen = flat.index_select(0, rows_OJM[..., m].int().flatten() + m * k)
            total = chosen if total is None else total + chosen
        assert total is not None
        return total.view(*rows_OJM.shape[:2], v)

    def rows_of(self, codes_OI: Tensor) -> Tensor:
        """The rows (O, J, M), uint8, that codes stand for."""
        books, k, v = self.values.shape
        width = (k - 1).bit_length()
        return _recut(codes_OI, books * width // v, width).view(len(codes_OI), -1, books)

    def codes_of(self, rows_OJM: Tensor) -> Tensor:
        """The codes (O, I), uint8, of these rows."""
        books, k, v = self.values.shape
        width = (k - 1).bit_length()
        return _recut(rows_OJM.flatten(1), width, books * width // v)

    def to(self, device: torch.device | str) -> Books:
        return Books(self.values.to(device))

    def rows(self, rows: slice | Tensor) -> Books:
        return self


Levels = Uniform | Table | Books


def _recut(fields_ON: Tensor, width: int, wanted: int) -> Tensor:
    """Fields of `width` bits, one after the other, as fields of `wanted` bits, uint8."""
    device = fields_ON.device
    places = torch.arange(width, dtype=torch.uint8, device=device)
    bits = (fields_ON.to(torch.uint8)[..., None] >> places & 1).view(len(fields_ON), -1, wanted)
    return (bits << torch.arange(wanted, dtype=torch.uint8, device=device)).sum(-1, dtype=torch.uint8)


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

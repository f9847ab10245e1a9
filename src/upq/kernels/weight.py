"""A packed weight as kernels get it: the canonical tensors, and the layout of the compiled kernels, cached.

Compiled kernels know evenly spaced levels, and on the CPU code books. A table whose values are integers on one step, as
E2M1's on a half, is the same weight with other codes of more bits: E2M1's are -12 … 12, five bits. Other tables are
left to the reference.

Shape suffixes: O = out features, G = groups in a row, B = bytes in a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upq.core.levels import Books, Table
from upq.core.memory import page_out
from upq.kernels import cpu, cuda
from upq.kernels.reference import Standing, Zero, pack, row_bytes, unpack

if TYPE_CHECKING:
    from upq.kernels import _cpu

_ROWS = 4096  # of a table's weight, whose codes are changed at one time


def _integers(table: Table) -> tuple[float, float, int, Table] | None:
    """A table as `(code - zero)·step` with other codes: step, zero point, their bits, and the table of those codes.

    None where they take more than eight bits.
    """
    lowest = table.values.min()
    for step in (1.0, 0.5, 0.25, 0.125):
        above = (table.values - lowest) / step
        if not above.frac().any():
            bits = max(int(above.max()).bit_length(), 2)
            return (step, -float(lowest) / step, bits, Table(above, table.choice_OG)) if bits <= 8 else None
    return None


class Weight:
    """Canonical tensors (reference.py) of a weight, and the same codes in its device's layout, built on first use.

    On the CPU the canonical tensors stay. In a loaded artefact they are mapped pages of its file, given back to the
    system once read; only the rearranged copy is memory of the process. On a CUDA device the rearranged codes
    replace the canonical ones, which become a view of them. So a model is in memory once.
    """

    def __init__(self, packed_OB: Tensor, scale_OG: Tensor, zero: Standing, *, bits: int, in_features: int) -> None:
        self.packed_OB, self.scale_OG, self.zero = packed_OB, scale_OG, zero
        self.bits, self.in_features = bits, in_features
        self._compiled = isinstance(zero, Tensor | float) or (isinstance(zero, Table) and _integers(zero) is not None)
        self._versions = self._current_versions()
        self._matrix: _cpu.PackedMatrix | None = None
        self._books: _cpu.PackedBooks | None = None
        self._cuda_matrix: cuda.Matrix | None = None

    def compiles_on(self, device: str) -> bool:
        """Whether compiled kernels for evenly spaced levels multiply with it on this type of device."""
        return self._compiled and not (device == "cuda" and isinstance(self.zero, Table))

    def is_of(self, packed_OB: Tensor, scale_OG: Tensor, zero: Standing) -> bool:
        """Whether it was made of these tensors, and nothing has been written to them since.

        Tensors made in inference mode have no version counter: replace those, do not write to them.
        """
        same = packed_OB is self.packed_OB and scale_OG is self.scale_OG and zero is self.zero
        return same and self._versions == self._current_versions()

    def matrix(self) -> _cpu.PackedMatrix:
        """The CPU layout. Built on first use, then cached."""
        if self._matrix is None:
            packed_OB, scale_OG, zero, bits = self.uniform()
            self._matrix = cpu.pack(packed_OB, scale_OG, zero, bits=bits, in_features=self.in_features)
            page_out(self.packed_OB)  # else both layouts stay: 597 MB were resident of a model of 310
        return self._matrix

    @property
    def of_books(self) -> bool:
        return isinstance(self.zero, Books)

    def book_matrix(self) -> _cpu.PackedBooks:
        """The CPU layout of code books. Built on first use, then cached."""
        if self._books is None:
            assert isinstance(self.zero, Books)
            self._books = cpu.pack_books(self.packed_OB, self.scale_OG, self.zero.values)
            page_out(self.packed_OB)
        return self._books

    def cuda_matrix(self) -> cuda.Matrix:
        """The CUDA layout. Built on first use, then cached. Only scales and zeros take memory of their own."""
        if self._cuda_matrix is None:
            assert not isinstance(self.zero, Table | Books), "levels that are not compiled"
            # The buffer stays as it is: a tensor with a version counter, or one of inference mode.
            with torch.inference_mode(self.packed_OB.is_inference()):
                self._cuda_matrix = cuda.pack(
                    self.packed_OB, self.scale_OG, self.zero, bits=self.bits, in_features=self.in_features
                )
                self.packed_OB.data = self._cuda_matrix.codes_BO.t()  # the same bytes to everyone who reads it
        return self._cuda_matrix

    def uniform(self) -> tuple[Tensor, Tensor, Zero, int]:
        """Codes, scales, zero point and bits of the same weight on evenly spaced levels."""
        assert not isinstance(self.zero, Books), "code books have products of their own"
        if not isinstance(self.zero, Table):
            return self.packed_OB, self.scale_OG, self.zero, self.bits
        found = _integers(self.zero)
        assert found is not None, "a table that is not compiled"
        step, zero, bits, codes = found
        rows = len(self.packed_OB)
        packed_OB = self.packed_OB.new_empty(rows, row_bytes(self.in_features, bits))
        for start in range(0, rows, _ROWS):
            part = slice(start, start + _ROWS)
            codes_OI = unpack(self.packed_OB[part], self.bits, self.in_features)
            groups_OGS = codes_OI.view(len(codes_OI), self.scale_OG.shape[1], -1)
            packed_OB[part] = pack(codes.rows(part).of(groups_OGS).to(torch.uint8).view_as(codes_OI), bits)
        scale_OG = self.scale_OG * step
        if not torch.equal(scale_OG.float(), self.scale_OG.float() * step):  # a power of two: below the least number
            scale_OG = self.scale_OG.float() * step
        return packed_OB, scale_OG, zero, bits

    def _current_versions(self) -> list[int]:
        tensors = [t for t in (self.packed_OB, self.scale_OG, self.zero) if isinstance(t, Tensor)]
        return [0 if t.is_inference() else t._version for t in tensors]

"""A packed weight as kernels get it: the canonical tensors, and the layout of the compiled kernels, cached.

Shape suffixes: O = out features, G = groups in a row, B = bytes in a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upq.core.memory import page_out
from upq.kernels import cpu, cuda

if TYPE_CHECKING:
    from upq.kernels import _cpu


class Weight:
    """Canonical tensors (reference.py) of a weight, and the same codes in its device's layout, built on first use.

    On the CPU the canonical tensors stay. In a loaded artefact they are mapped pages of its file, given back to the
    system once read; only the rearranged copy is memory of the process. On a CUDA device the rearranged codes
    replace the canonical ones, which become a view of them. So a model is in memory once.
    """

    def __init__(
        self, packed_OB: Tensor, scale_OG: Tensor, zero: Tensor | float, *, bits: int, in_features: int
    ) -> None:
        self.packed_OB, self.scale_OG, self.zero = packed_OB, scale_OG, zero
        self.bits, self.in_features = bits, in_features
        self._versions = self._current_versions()
        self._matrix: _cpu.PackedMatrix | None = None
        self._cuda_matrix: cuda.Matrix | None = None

    def is_of(self, packed_OB: Tensor, scale_OG: Tensor, zero: Tensor | float) -> bool:
        """Whether it was made of these tensors, and nothing has been written to them since.

        Tensors made in inference mode have no version counter: replace those, do not write to them.
        """
        same = packed_OB is self.packed_OB and scale_OG is self.scale_OG and zero is self.zero
        return same and self._versions == self._current_versions()

    def matrix(self) -> _cpu.PackedMatrix:
        """The CPU layout. Built on first use, then cached."""
        if self._matrix is None:
            self._matrix = cpu.pack(
                self.packed_OB, self.scale_OG, self.zero, bits=self.bits, in_features=self.in_features
            )
            page_out(self.packed_OB)  # else both layouts stay: 597 MB were resident of a model of 310
        return self._matrix

    def cuda_matrix(self) -> cuda.Matrix:
        """The CUDA layout. Built on first use, then cached. Only scales and zeros take memory of their own."""
        if self._cuda_matrix is None:
            # The buffer stays as it is: a tensor with a version counter, or one of inference mode.
            with torch.inference_mode(self.packed_OB.is_inference()):
                self._cuda_matrix = cuda.pack(
                    self.packed_OB, self.scale_OG, self.zero, bits=self.bits, in_features=self.in_features
                )
                self.packed_OB.data = self._cuda_matrix.codes_BO.t()  # the same bytes to everyone who reads it
        return self._cuda_matrix

    def _current_versions(self) -> list[int]:
        tensors = [t for t in (self.packed_OB, self.scale_OG, self.zero) if isinstance(t, Tensor)]
        return [0 if t.is_inference() else t._version for t in tensors]

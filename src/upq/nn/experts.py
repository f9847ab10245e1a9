"""The weights of experts on a grid: one tall matrix (E·O, I), of which an expert's rows multiply.

They take the place of an expert module's parameter; the module's own forward loops over the experts.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from upq import kernels
from upq.core.scheme import QTensor, QuantScheme
from upq.model.experts import PerExpert
from upq.model.matrices import Matrix
from upq.nn.packed import Packed
from upq.nn.trained import TrainedLinear, product


class TrainedExperts(PerExpert, nn.Module):
    """Weights that learn. `layer` is what a linear of E·O outputs would train from.

    Law (tests/test_experts.py): output and gradients are those of the quantised tensor in the module's own forward.
    """

    def __init__(self, layer: TrainedLinear, matrix: Matrix) -> None:
        super().__init__()
        self.layer, self.experts, self.shape = layer, matrix.experts, matrix.parameter_shape
        self._split: tuple[object, dict[str, tuple[Tensor, ...]]] | None = None

    def product(self, expert: int, x: Tensor) -> Tensor:
        outputs = self.layer.shape[0] // self.experts
        rows = slice(expert * outputs, (expert + 1) * outputs)
        learned = {name: parts[expert] for name, parts in self._parts().items()}
        backward = None if self.layer.backward is None else self.layer.backward.at(expert)
        return product(x, None, partial(self.layer._weight, rows=rows), learned, backward)

    def _parts(self) -> dict[str, tuple[Tensor, ...]]:
        """What learns, cut by expert. Once for all experts of a pass: a slice each would have a gradient as tall as
        the whole matrix."""
        learned = self.layer._learned()
        key = (torch.is_grad_enabled(), *((t.data_ptr(), t._version) for t in learned.values()))
        if self._split is None or self._split[0] != key:
            self._split = key, {name: tensor.chunk(self.experts) for name, tensor in learned.items()}
        return self._split[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_split": None}


class PackedExperts(Packed, PerExpert):
    """Weights that multiply from codes, an expert's rows at a time.

    Law (tests/test_experts.py): through the reference kernels, the output equals that of the TrainedExperts the codes
    came from, bit for bit.
    """

    def __init__(self, matrix: Matrix, scheme: QuantScheme) -> None:
        super().__init__(matrix.rows, matrix.inputs, scheme)
        self.matrix, self.shape = matrix, matrix.parameter_shape
        self._made_of: tuple[object, ...] = ()
        self._of_expert: dict[int, kernels.Weight] = {}
        self._decoded: tuple[Tensor, kernels.Standing] | None = None

    @classmethod
    def from_qtensor(cls, q: QTensor, matrix: Matrix) -> PackedExperts:
        with torch.device("meta"):
            layer = cls(matrix, q.scheme)
        return layer._fill(q)

    def product(self, expert: int, x: Tensor) -> Tensor:
        return kernels.linear(x, self._weight_of(expert))

    def kernel_weights(self) -> tuple[kernels.Weight, ...]:
        """What kernels multiply with, by expert. Made when first asked for, and again when a buffer has changed."""
        self._forget_changed()
        return tuple(self._of_expert.get(e) or self._made(e) for e in range(self.matrix.experts))

    def _weight_of(self, expert: int) -> kernels.Weight:
        self._forget_changed()
        return self._of_expert.get(expert) or self._made(expert)

    def _forget_changed(self) -> None:
        key = tuple((t.data_ptr(), version) for t, version in self._versions())
        if self._made_of != key:
            self._made_of, self._of_expert, self._decoded = key, {}, self.decoded()

    def _made(self, expert: int) -> kernels.Weight:
        rows = slice(expert * self.matrix.outputs, (expert + 1) * self.matrix.outputs)
        assert self._decoded is not None
        scale_OG, zero = self._decoded
        of_rows = kernels.rows_of(zero, rows)
        bits, columns = self.scheme.bits, self.matrix.inputs
        made = kernels.Weight(self.weight_packed[rows], scale_OG[rows], of_rows, bits=bits, in_features=columns)
        self._of_expert[expert] = made
        return made

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_weight": None, "_stored": [], "_made_of": (), "_of_expert": {}, "_decoded": None}

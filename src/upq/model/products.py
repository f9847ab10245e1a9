"""Shows the inputs of a block's products while it runs.

Shape suffixes: I in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from upq.model.experts import PerExpert, stand_in
from upq.model.matrices import Matrix

See = Callable[[Matrix, int, Tensor], None]  # a weight, the expert (0 of a linear), its input (…, I)


@contextmanager
def seen(block: nn.Module, matrices: Iterable[Matrix], see: See) -> Iterator[None]:
    """Within, `see` is called before each product of `block` with one of these weights."""
    handles, restore = [], list[Callable[[], None]]()
    for matrix in matrices:
        if matrix.experts:
            restore.append(_see_experts(block, matrix, see))
        else:
            handles.append(block.get_submodule(matrix.name).register_forward_pre_hook(_hook(matrix, see)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for undo in restore:
            undo()


def _hook(matrix: Matrix, see: See) -> Any:
    return lambda _module, args: see(matrix, 0, args[0])


def _see_experts(block: nn.Module, matrix: Matrix, see: See) -> Callable[[], None]:
    experts, leaf = block.get_submodule(matrix.module), matrix.name.rpartition(".")[2]
    parameter, config = block.get_parameter(matrix.parameter), vars(experts).get("config")
    weight_EOI = parameter.transpose(-1, -2) if matrix.transposed else parameter

    class Seen(PerExpert):
        shape = parameter.shape

        def product(self, expert: int, x: Tensor) -> Tensor:
            see(matrix, expert, x)
            return F.linear(x, weight_EOI[expert])

    stand_in(experts, leaf, Seen())

    def undo() -> None:
        del experts.__dict__[leaf]
        experts._parameters[leaf] = parameter
        if config is not None:
            experts.config = config

    return undo

"""Stops a walk where the hidden states stop being numbers, before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from upq.core.errors import UPQError
from upq.model.matrices import Matrix
from upq.model.walker import hidden_states


@contextmanager
def watched(block: nn.Module, matrices: tuple[Matrix, ...], where: str, remedy: str) -> Iterator[None]:
    """Within, the first module that multiplies and writes NaN or infinity is an UPQError, or else the block itself."""

    def check(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Tensor | tuple[Any, ...]) -> None:
            if not hidden_states(out).isfinite().all():
                raise UPQError(f"{where}: what {name} writes holds NaN or infinity; {remedy}")

        return hook

    watch = {path: block.get_submodule(path) for path in dict.fromkeys(matrix.module for matrix in matrices)}
    watch["the block, but none of its products,"] = block
    handles = [module.register_forward_hook(check(name)) for name, module in watch.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

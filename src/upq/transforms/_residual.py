"""Who reads and who writes the residual stream of a decoder block, found by watching one forward pass.

Shape suffixes: B rows, T tokens, H hidden size, O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from upq.model.matrices import Matrix, products
from upq.model.products import seen
from upq.transforms._base import Run


@dataclass
class Residual:
    """Of one block. Names are paths of parameters within it."""

    norms: dict[str, float] = field(default_factory=dict)  # path of a norm, and what it adds to its weight: 0 or 1
    readers: dict[str, str] = field(default_factory=dict)  # a parameter (…, O, I), and the norm whose output it reads
    transposed: set[str] = field(default_factory=set)  # of the readers and writers, those that are (…, I, O)
    writers: list[Matrix] = field(default_factory=list)  # linears and experts whose output has the width of the stream


def residual(block: nn.Module, width: int, run: Run) -> Residual:
    """The parts of a block. `run` calls it as the model does.

    A reader is a product whose input rows are rows of a norm's output. A writer is any other product with outputs as
    wide as the stream. Both are guesses until the changed block has been compared with the one before.
    """
    found, outputs = Residual(), dict[str, Tensor]()
    for path, module in block.named_modules():
        offset = rms_offset(module, width)
        if offset is not None:
            found.norms[path] = offset
    matrices = products(block)
    of_matrices = {matrix.parameter for matrix in matrices}
    found.transposed = {matrix.parameter for matrix in matrices if matrix.transposed}

    def read(parameter: str, x: Tensor) -> None:
        first = x.reshape(-1, x.shape[-1])[:1] if x.shape[-1] == width else x.new_zeros(0, width)
        for norm, rows in outputs.items():
            if len(first) and bool((rows == first).all(-1).any()):
                found.readers[parameter] = norm

    linears = seen(block, matrices, lambda matrix, _expert, x: read(matrix.parameter, x))
    with _watched(block, found.norms, outputs), _others(block, width, of_matrices, read), linears, torch.no_grad():
        run(block, _states(width))
    found.writers = [m for m in matrices if m.outputs == width and m.parameter not in found.readers]
    return found


def rms_offset(module: nn.Module, width: int) -> float | None:
    """0 where a norm computes w·x/rms(x), 1 where (1 + w)·x/rms(x); None for all other modules, LayerNorm too."""
    parameters = dict(module.named_parameters())
    if parameters.keys() != {"weight"} or parameters["weight"].shape != (width,) or list(module.children()):
        return None
    x = torch.linspace(-1, 2, 2 * width, dtype=torch.float32).view(2, width).roll(3, 1)
    x = x.to(parameters["weight"].device)
    with torch.no_grad():
        try:
            zero, one = (functional_call(module, {"weight": torch.full_like(x[0], w)}, (x,)) for w in (0.0, 1.0))
        except TypeError:  # it takes more than hidden states
            return None
    if zero.shape != x.shape:
        return None
    normed = one - zero
    if not torch.allclose(normed, x * x.square().mean(-1, keepdim=True).rsqrt(), rtol=1e-3, atol=1e-3):
        return None
    return 1.0 if torch.allclose(zero, normed, atol=1e-5) else 0.0 if not zero.any() else None


def _states(width: int) -> Tensor:
    """(1, T, H) of different rows."""
    return torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0))


@contextmanager
def _watched(block: nn.Module, norms: dict[str, float], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Within, the rows that each norm gives are in `outputs`."""

    def hook(path: str) -> object:
        def keep(_module: nn.Module, _args: object, out: Tensor) -> None:
            outputs[path] = out.reshape(-1, out.shape[-1])

        return keep

    handles = [block.get_submodule(path).register_forward_hook(hook(path)) for path in norms]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _others(block: nn.Module, width: int, known: set[str], read: object) -> Iterator[None]:
    """Within, modules with a weight (O, H) that are no linears, routers for one, are watched too."""
    handles = []
    for path, module in block.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or weight.shape[-1] != width or f"{path}.weight" in known:
            continue

        def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = f"{path}.weight") -> None:
            if args:
                read(name, args[0])  # type: ignore[operator]

        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Products with packed weights. Layers call these names only; this module chooses the kernels behind them.

`set_compute`, `computing` or the environment variable UPQ_KERNELS (read once) select one of:

    w2a8        compiled, activations in int8: the default on the CPU, and not on CUDA
    w2a16       compiled, activations in float32 on the CPU, as they come on CUDA: the default there
    reference   plain torch: exactly what was trained, and slow

Other devices always run the reference. So does a table of levels, on CUDA every one, on the CPU one that is not small
integers on one step (R2Q, FP6). Code books have a kernel of their own on the CPU, in float32 whichever of the two is
chosen, and on CUDA the reference. Nothing else falls back to it in silence: without the compiled module on the CPU or
gemlite on CUDA, w2a8 and w2a16 are an UPQError, and so is w2a8 on CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

from torch import Tensor

from upq.core.errors import UPQError
from upq.kernels import cpu, cuda, reference
from upq.kernels.reference import Standing, dequantize, embedding, pack, rows_of, unpack
from upq.kernels.weight import Weight

__all__ = [
    "COMPUTES",
    "Compute",
    "Standing",
    "Weight",
    "compute",
    "computing",
    "dequantize",
    "embedding",
    "linear",
    "linears",
    "pack",
    "rounds",
    "rows_of",
    "set_compute",
    "unpack",
]

Compute = Literal["w2a8", "w2a16", "reference"]
COMPUTES: tuple[Compute, ...] = get_args(Compute)
_DEFAULT: dict[str, Compute] = {"cpu": "w2a8", "cuda": "w2a16"}

# One choice for the process, not one a thread: a generation in a thread of its own keeps the choice.
_chosen: Compute | None = None


def compute(device: str = "cpu") -> Compute:
    """The kernels that products on a device of this type use now."""
    if device not in _DEFAULT:
        return "reference"
    chosen = _chosen or _of_environment() or _DEFAULT[device]
    if device == "cuda" and chosen == "w2a8":
        raise UPQError("kernels w2a8 run on the CPU alone; on CUDA choose w2a16 (the default there) or reference")
    return chosen


@cache
def _of_environment() -> Compute | None:
    """The value of UPQ_KERNELS, cached: reading the environment takes 2 µs, and a token passes 100 linears."""
    named = os.environ.get("UPQ_KERNELS")
    return None if named is None else _named(named, "UPQ_KERNELS")


def set_compute(name: str | None) -> None:
    """Choose for this process. None goes back to UPQ_KERNELS (read again) or the default."""
    global _chosen
    _chosen = None if name is None else _named(name, "set_compute")
    if name is None:
        _of_environment.cache_clear()


@contextmanager
def computing(name: str) -> Iterator[None]:
    """`set_compute` for a block of code."""
    before = _chosen
    set_compute(name)
    try:
        yield
    finally:
        set_compute(before)


def linear(x: Tensor, weight: Weight, bias_O: Tensor | None = None, *, rounded: bool = False) -> Tensor:
    """`x · Ŵᵀ + b` for x (..., I), in the dtype of `x`.

    `rounded`: x is on a grid of its own already. w2a8 would round it once more, so w2a16 takes its place.
    """
    return linears(x, [weight], [bias_O], rounded=rounded)[0]


def linears(
    x: Tensor,
    weights: Sequence[Weight],
    biases_O: Sequence[Tensor | None] | None = None,
    *,
    rounded: bool = False,
) -> list[Tensor]:
    """The products of one x with several weights; on the CPU in one call that quantises x once."""
    biases_O = [None] * len(weights) if biases_O is None else biases_O
    device = "cpu" if x.is_cpu else x.device.type  # the name takes 0.8 µs
    how = compute(device)
    if how == "reference" or not all(weight.compiles_on(device) for weight in weights):
        tables = device == "cpu" and how != "reference"
        return [
            cpu.book_linear(x, w.book_matrix(), bias_O)
            if tables and w.of_books
            else reference.linear(
                x, w.packed_OB, w.scale_OG, w.zero, bits=w.bits, in_features=w.in_features, bias_O=bias_O
            )
            for w, bias_O in zip(weights, biases_O, strict=True)
        ]
    if device == "cuda":
        return cuda.linears(x, [weight.cuda_matrix() for weight in weights], biases_O)
    how = "w2a16" if rounded else how
    return cpu.linears(x, [weight.matrix() for weight in weights], biases_O, compute=how)


def rounds(weight: Weight, x: Tensor) -> bool:
    """Whether the product of x with this weight rounds x to int8, one scale a token."""
    return x.is_cpu and weight.compiles_on("cpu") and compute() == "w2a8"


def _named(name: str, where: str) -> Compute:
    for known in COMPUTES:
        if name == known:
            return known
    raise UPQError(f"{where}: unknown kernels {name!r}; choose one of {', '.join(COMPUTES)}")

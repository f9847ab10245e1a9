from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from upq.core.registry import Registry
from upq.core.scheme import QTensor, QuantScheme

Params = dict[str, Tensor]  # learnable parameters of a grid, each (O, G) float32
ZERO = "zero"  # the parameter that is a zero point, in grids that learn one

# Below 2^-20 a float16 scale keeps fewer than five significant bits, and exporters halve it once more.
SMALLEST_SCALE = 2.0**-20


class Grid(Protocol):
    """Law (tests/test_grids.py): `fake(w, p, s) == freeze(w, p, s).dequantize()`, bit for bit."""

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        """Parameters whose levels just cover the range of each group."""
        ...

    def fake(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        """Quantised-dequantised weight, float32, with straight-through gradients for `w_OI` and every parameter."""
        ...

    def freeze(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> QTensor:
        """The value that `fake` computes, as codes."""
        ...

    def scale_and_zero(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point (O, G), float32, of the codes that `freeze` gives: as stored, differentiable."""
        ...

    def zero(self, scheme: QuantScheme) -> float | None:
        """The zero point all groups share, or None where each group stores its own."""
        ...


GRIDS: Registry[Grid] = Registry("upq.grids", "grid")


class _StoredScale(torch.autograd.Function):
    """Round a scale to the type it is stored in; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: object, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return scale.clamp(SMALLEST_SCALE, torch.finfo(dtype).max).to(dtype).float()

    @staticmethod
    def backward(ctx: object, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0], None


# Weights at a time on the CPU, so that they and their temporaries stay in its caches. The bits are the same. On SEQ the
# search for the scales of 2048 x 2048 weights takes 0.68 s of one core in place of 2.6. The quantised weight of 8192 x
# 2048 takes 0.04 s in place of 0.23, its gradient 0.15 in place of 0.44.
CHUNK = 1 << 18


def stretches_of_rows(w: Tensor) -> Iterator[slice]:
    """Slices of rows of `w` that fit a processor's caches; on other devices one slice of all rows."""
    rows = len(w)
    if type(w) is Tensor and w.device.type == "cpu" and w.numel() > CHUNK:
        rows = max(1, CHUNK * len(w) // w.numel())
    return (slice(start, start + rows) for start in range(0, len(w), max(rows, 1)))


def stored_scale(scale: Tensor, scheme: QuantScheme) -> Tensor:
    """The float32 value that `scale` has after a round trip through `scheme.scale_dtype`."""
    rounded: Tensor = _StoredScale.apply(scale, scheme.scale_torch_dtype)  # type: ignore[no-untyped-call]
    return rounded

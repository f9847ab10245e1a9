from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from upq.registry import Registry
from upq.scheme import QTensor, QuantScheme

Params = dict[str, Tensor]  # learnable parameters of a grid, each (O, G) float32

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


def stored_scale(scale: Tensor, scheme: QuantScheme) -> Tensor:
    """The float32 value that `scale` has after a round trip through `scheme.scale_dtype`."""
    rounded: Tensor = _StoredScale.apply(scale, scheme.scale_torch_dtype)  # type: ignore[no-untyped-call]
    return rounded

"""Compiled products inside a graph: they run, and `backward` is an error instead of a wrong gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from upq.core.errors import UPQError


def without_gradient(
    products: Callable[[], list[Tensor]], kernels: str, x: Tensor, biases_O: Sequence[Tensor | None]
) -> list[Tensor]:
    """`products` of x and the biases, through the kernels of this name."""
    if not torch.is_grad_enabled():
        return products()
    given = [b for b in biases_O if b is not None]
    if x.requires_grad or any(b.requires_grad for b in given):
        return list(_WithoutGradient.apply(products, kernels, x, *given))  # type: ignore[no-untyped-call]
    return products()


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, products: Callable[[], list[Tensor]], kernels: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.kernels = kernels
        return tuple(products())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise UPQError(
            f"the {ctx.kernels} kernels have no gradient; UPQ_KERNELS=reference has one, or load with dequantize=True"
        )

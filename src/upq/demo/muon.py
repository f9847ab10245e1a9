"""Muon (Jordan et al., 2024): momentum whose singular values are all made one, for matrices inside a network.

A two-minute training has room for about a thousand steps. With AdamW alone the model does not learn to copy a word
from its prompt in that time; with Muon it begins to after 150 steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic with the steepest slope at zero, from the authors


class Muon:
    """Matrices of one shape are orthogonalised together: one batched product instead of many small ones."""

    def __init__(self, matrices: Iterable[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self._momentum = momentum
        self._weight_decay = weight_decay
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        self._groups = [(group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients, which are cleared."""
        for group, velocity_NOI in self._groups:
            gradient_NOI = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            velocity_NOI.lerp_(gradient_NOI, 1 - self._momentum)
            update_NOI = orthogonal(gradient_NOI.lerp(velocity_NOI, self._momentum))  # Nesterov
            rows, columns = update_NOI.shape[-2:]
            size = lr * max(1.0, rows / columns) ** 0.5
            for matrix, update_OI in zip(group, update_NOI, strict=True):
                matrix.mul_(1 - lr * self._weight_decay).sub_(update_OI, alpha=size)
                matrix.grad = None


def orthogonal(matrices_NOI: Tensor, *, iterations: int = 5) -> Tensor:
    """Near the closest (semi-)orthogonal matrices: the same singular vectors, singular values within 0.7 to 1.2."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrices_NOI.shape[-2] <= matrices_NOI.shape[-1]
    x: Tensor = matrices_NOI if wide else matrices_NOI.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, b * gram + c * gram @ gram, x, beta=a)
    return x if wide else x.mT

"""Weights that learn: fp32 latents, seen through a grid in every forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upq.core.scheme import QTensor, QuantScheme
from upq.grids import GRIDS, Params
from upq.nn.trained import ALL, TrainedLinear, full_tensor, owned

_LATENT = "weight"


def rms(tensor: Tensor) -> float:
    """Root mean square: the unit of weights' learning rates (about 0.02 in a 1B model, 0.12 in a tiny one)."""
    return float(full_tensor(tensor.detach()).float().square().mean().sqrt())


@dataclass(frozen=True)
class Solution:
    """A quantised linear. `grid.freeze(latent_OI, params)` is its QTensor; training goes on from the latents."""

    latent_OI: Tensor
    params: Params
    scheme: QuantScheme

    def qtensor(self) -> QTensor:
        return GRIDS.get(self.scheme.grid).freeze(self.latent_OI, self.params, self.scheme)

    def layer(self, bias_O: Tensor | None, device: torch.device) -> FakeQuantLinear:
        """The linear that trains from here."""
        return FakeQuantLinear(self.latent_OI, self.params, self.scheme, bias_O, device=device)


class FakeQuantLinear(TrainedLinear):
    """`Ŵ = grid.fake(weight, params)`. Latents and grid parameters learn.

    fp32 because at a learning rate of 1e-5 a bf16 weight of 0.02 does not move (its spacing is 1.2e-4).
    """

    def __init__(
        self,
        latent_OI: Tensor,
        params: Params,
        scheme: QuantScheme,
        bias_O: Tensor | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        """On `device`, or where the latent is."""
        device = device or latent_OI.device
        super().__init__(params, scheme, bias_O, device)
        self.weight = nn.Parameter(owned(latent_OI, device))

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns

    def solution(self) -> Solution:
        return Solution(full_tensor(self.weight.detach()), self._whole_params(), self.scheme)

    def _learned(self) -> dict[str, Tensor]:
        return {_LATENT: self.weight, **self.grid_params}

    def _weight(self, learned: dict[str, Tensor], rows: slice = ALL) -> Tensor:
        params = {name: value for name, value in learned.items() if name != _LATENT}
        return GRIDS.get(self.scheme.grid).fake(learned[_LATENT], params, self.scheme)

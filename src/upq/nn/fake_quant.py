"""What trains: fp32 latent weights, seen through a grid in every forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from upq.grids import GRIDS, Params
from upq.scheme import QTensor, QuantScheme


def rms(tensor: Tensor) -> float:
    """Root mean square: the unit of weights' learning rates (about 0.02 in a 1B model, 0.12 in a tiny one)."""
    return float(whole(tensor.detach()).float().square().mean().sqrt())


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all its shards together: every process has to ask for it, and each gets all."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Solution:
    """A quantised linear. `grid.freeze(latent_OI, params)` is its QTensor; training goes on from the latents."""

    latent_OI: Tensor
    params: Params
    scheme: QuantScheme

    def qtensor(self) -> QTensor:
        return GRIDS.get(self.scheme.grid).freeze(self.latent_OI, self.params, self.scheme)


class FakeQuantLinear(nn.Module):
    """`y = x · Ŵᵀ + b` with `Ŵ = grid.fake(weight, params)`. Latents and grid parameters are fp32 and learn.

    fp32 because at a learning rate of 1e-5 a bf16 weight of 0.02 does not move (its spacing is 1.2e-4).
    """

    bias: Tensor | None

    def __init__(self, latent_OI: Tensor, params: Params, scheme: QuantScheme, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        self.weight = nn.Parameter(_owned(latent_OI))
        self.grid_params = nn.ParameterDict({k: nn.Parameter(_owned(v)) for k, v in params.items()})
        self.register_buffer("bias", None if bias_O is None else bias_O.detach())

    def fake(self) -> Tensor:
        """The quantised weight (O, I), float32, differentiable."""
        return GRIDS.get(self.scheme.grid).fake(self.weight, dict(self.grid_params), self.scheme)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fake().to(x.dtype), self.bias)

    def freeze(self) -> QTensor:
        params = {key: whole(value) for key, value in self.grid_params.items()}
        return GRIDS.get(self.scheme.grid).freeze(whole(self.weight), params, self.scheme)

    def extra_repr(self) -> str:
        o, i = self.weight.shape
        return f"in_features={i}, out_features={o}, bias={self.bias is not None}, {self.scheme}"


def _owned(tensor: Tensor) -> Tensor:
    """An fp32 copy: a latent that shared the teacher's memory would train the teacher."""
    return tensor.detach().to(torch.float32, copy=True)

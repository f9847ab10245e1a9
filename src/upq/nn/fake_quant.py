"""What trains: fp32 latent weights, seen through a grid in every forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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


class _Product(torch.autograd.Function):
    """`x · Ŵᵀ + b` that keeps x and what learns, and computes Ŵ again in the backward pass.

    Law (tests/test_fake_quant.py): outputs and gradients are those of the plain form, bit for bit.

    Kept, Ŵ is 4 bytes more a weight beside the latent's, gradient's and moments' 16 (with `affine` 12). Computing it
    again took 3 to 7 % of a training step of 1,024 tokens on a CPU (hidden 256: 740 ms for 717; hidden 1,024: 2.32 s
    for 2.16), and less the more tokens a step has. At the sizes that matter the memory decides, so there is no choice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias_O: Tensor | None,
        scheme: QuantScheme,
        names: Sequence[str],
        weight_OI: Tensor,
        *params_OG: Tensor,
    ) -> Tensor:
        fake_OI = GRIDS.get(scheme.grid).fake(weight_OI, dict(zip(names, params_OG, strict=True)), scheme)
        # Of a transposed x, torch chooses another product where no gradient is asked for, with other last bits.
        y = F.linear(x.contiguous(), fake_OI.to(x.dtype), bias_O)
        # x as it came, not as autocast saw it: one tensor for all linears that read it.
        ctx.save_for_backward(x, weight_OI, *params_OG)
        ctx.scheme, ctx.names = scheme, names
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *learned = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(learned, needs, strict=True)]
        with torch.enable_grad():
            params = dict(zip(ctx.names, leaves[1:], strict=True))
            # The gradient has the type the product was computed in, which under autocast is not that of x.
            fake_OI = GRIDS.get(ctx.scheme.grid).fake(leaves[0], params, ctx.scheme).to(x.dtype).to(grad.dtype)
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TO @ fake_OI.detach()).view(x.shape).to(x.dtype)
        grads: list[Tensor | None] = [None] * len(leaves)
        if any(needs):
            grad_OI = grad_TO.t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
            learning = [i for i, need in enumerate(needs) if need]
            found = torch.autograd.grad(fake_OI, [leaves[i] for i in learning], grad_OI)
            for i, value in zip(learning, found, strict=True):
                grads[i] = value
        return grad_x, None, None, None, *grads


class FakeQuantLinear(nn.Module):
    """`y = x · Ŵᵀ + b` with `Ŵ = grid.fake(weight, params)`. Latents and grid parameters are fp32 and learn.

    fp32 because at a learning rate of 1e-5 a bf16 weight of 0.02 does not move (its spacing is 1.2e-4).
    """

    bias: Tensor | None

    def __init__(
        self,
        latent_OI: Tensor,
        params: Params,
        scheme: QuantScheme,
        bias_O: Tensor | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        """On `device`, or where the latent is; a bias is shared and has to be there already."""
        super().__init__()
        device = device or latent_OI.device
        self.scheme = scheme
        self.weight = nn.Parameter(_owned(latent_OI, device))
        self.grid_params = nn.ParameterDict({k: nn.Parameter(_owned(v, device)) for k, v in params.items()})
        self.register_buffer("bias", None if bias_O is None else bias_O.detach())

    def fake(self) -> Tensor:
        """The quantised weight (O, I), float32, differentiable."""
        return GRIDS.get(self.scheme.grid).fake(self.weight, dict(self.grid_params), self.scheme)

    def forward(self, x: Tensor) -> Tensor:
        names, params_OG = tuple(self.grid_params), tuple(self.grid_params.values())
        y: Tensor = _Product.apply(x, self.bias, self.scheme, names, self.weight, *params_OG)  # type: ignore[no-untyped-call]
        return y

    def freeze(self) -> QTensor:
        params = {key: whole(value) for key, value in self.grid_params.items()}
        return GRIDS.get(self.scheme.grid).freeze(whole(self.weight), params, self.scheme)

    def extra_repr(self) -> str:
        o, i = self.weight.shape
        return f"in_features={i}, out_features={o}, bias={self.bias is not None}, {self.scheme}"


def _owned(tensor: Tensor, device: torch.device) -> Tensor:
    """An fp32 copy: a latent that shared the teacher's memory would train the teacher."""
    return tensor.detach().to(device, torch.float32, copy=True)

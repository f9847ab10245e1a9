"""Linears that train on a grid: what they share, whatever of them learns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from upq.core.scheme import QTensor, QuantScheme
from upq.grids import GRIDS, Params
from upq.nn.activations import ActQuantiser
from upq.nn.ms_eden import Backward

if TYPE_CHECKING:
    from upq.nn.fixed_codes import Start

Weight = Callable[[dict[str, Tensor]], Tensor]  # what learns, by name, to the weight (O, I), float32, differentiable
ALL = slice(None)


class TrainedLinear(nn.Module):
    """`y = x · Ŵᵀ + b` with Ŵ on a grid. What learns is float32: of the grid's parameters all but its fixed ones."""

    bias: Tensor | None

    def __init__(self, params: Params, scheme: QuantScheme, bias_O: Tensor | None, device: torch.device) -> None:
        """A bias is shared, and has to be on `device` already."""
        super().__init__()
        self.scheme = scheme
        fixed = GRIDS.get(scheme.grid).fixed
        own = {k: nn.Parameter(owned(v, device), requires_grad=k not in fixed) for k, v in params.items()}
        self.grid_params = nn.ParameterDict(own)
        self.register_buffer("bias", None if bias_O is None else bias_O.detach())
        self.input: ActQuantiser | None = None  # how what it reads is rounded
        self.backward: Backward | None = None  # how the products of the backward pass are rounded; None: not at all

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(O, I)."""

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1]

    @abstractmethod
    def solution(self) -> Start:
        """What it has become, to train on from or to pack. Where it is sharded, every process has to call this."""

    def freeze(self) -> QTensor:
        """The weight as codes. Where it is sharded, every process has to call this."""
        with torch.no_grad():
            return self.solution().qtensor()

    @abstractmethod
    def _learned(self) -> dict[str, Tensor]:
        """What learns, by name."""

    @abstractmethod
    def _weight(self, learned: dict[str, Tensor], rows: slice = ALL) -> Tensor:
        """Ŵ (O, I) of what learns, float32, differentiable. `learned` is that of these `rows`."""

    def fake(self) -> Tensor:
        """The quantised weight (O, I), float32, differentiable."""
        return self._weight(self._learned())

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input is None else self.input(x)
        return product(x, self.bias, self._weight, self._learned(), self.backward)

    def _whole_params(self) -> Params:
        return {key: full_tensor(value.detach()) for key, value in self.grid_params.items()}

    def extra_repr(self) -> str:
        o, i = self.shape
        return f"in_features={i}, out_features={o}, bias={self.bias is not None}, {self.scheme}"


def product(
    x: Tensor, bias_O: Tensor | None, weight: Weight, learned: dict[str, Tensor], backward: Backward | None = None
) -> Tensor:
    """`x · Ŵᵀ + b` with `Ŵ = weight(learned)`, keeping x and what learns; Ŵ is computed again in the backward pass.

    Law (tests/test_fake_quant.py): outputs and gradients are those of the plain form, bit for bit.

    Kept, Ŵ is 4 bytes more a weight beside the latent's, gradient's and moments' 16 (with `affine` 12). Computing it
    again took 3 to 7 % of a training step of 1,024 tokens on a CPU (hidden 256: 740 ms for 717; hidden 1,024: 2.32 s
    for 2.16), and less the more tokens a step has. At the sizes that matter the memory decides, so there is no choice.
    """
    y: Tensor = _Product.apply(x, bias_O, weight, backward, tuple(learned), *learned.values())  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias_O: Tensor | None,
        weight: Weight,
        backward: Backward | None,
        names: tuple[str, ...],
        *learned: Tensor,
    ) -> Tensor:
        weight_OI = weight(dict(zip(names, learned, strict=True)))
        # Of a transposed x, torch chooses another product where no gradient is asked for, with other last bits.
        y = F.linear(x.contiguous(), weight_OI.to(x.dtype), bias_O)
        # x as it came, not as autocast saw it: one tensor for all linears that read it.
        ctx.save_for_backward(x, *learned)
        ctx.weight, ctx.backward_products, ctx.names = weight, backward, names
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *learned = ctx.saved_tensors
        needs, rounded = ctx.needs_input_grad[5:], ctx.backward_products
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(learned, needs, strict=True)]
        with torch.enable_grad():
            weight_OI = ctx.weight(dict(zip(ctx.names, leaves, strict=True)))
            # The gradient has the type the product was computed in, which under autocast is not that of x.
            weight_OI = weight_OI.to(x.dtype).to(grad.dtype)
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            plain_OI = weight_OI.detach()
            grad_TI = grad_TO @ plain_OI if rounded is None else rounded.of_input(grad_TO, plain_OI)
            grad_x = grad_TI.view(x.shape).to(x.dtype)
        grads: list[Tensor | None] = [None] * len(leaves)
        if any(needs):
            x_TI = x.reshape(-1, x.shape[-1]).to(grad.dtype)
            grad_OI = grad_TO.t() @ x_TI if rounded is None else rounded.of_weight(grad_TO, x_TI)
            learning = [i for i, need in enumerate(needs) if need]
            found = torch.autograd.grad(weight_OI, [leaves[i] for i in learning], grad_OI)
            for i, value in zip(learning, found, strict=True):
                grads[i] = value
        return grad_x, None, None, None, None, *grads


def owned(tensor: Tensor, device: torch.device) -> Tensor:
    """A float32 copy: a latent that shared the teacher's memory would train the teacher."""
    return tensor.detach().to(device, torch.float32, copy=True)


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all its shards together: every process has to ask for it, and each gets all."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

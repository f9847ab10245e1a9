"""Stands in for a tensor of experts: each product with one of them goes to a function of ours.

transformers' expert modules loop over the experts that a batch reached (`eager`), and take a weight by `tensor[e]`.
What they compute around the products (routing, gates, biases) stays theirs, whatever the class.

Shape suffixes: E experts, n tokens of an expert, O out, I in.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upq.core.errors import UPQError

Product = Callable[[int, Tensor], Tensor]  # expert, x (n, I) -> y (n, O)


class PerExpert:
    """In place of a tensor (E, O, I), or (E, I, O): products with one expert, or with all by `bmm`."""

    shape: torch.Size | tuple[int, ...]  # of the tensor

    @abstractmethod
    def product(self, expert: int, x: Tensor) -> Tensor:
        """`x · Wᵀ` for one expert's W (O, I) and its tokens x (n, I)."""

    def __getitem__(self, expert: Any) -> _Expert:
        return _Expert(int(expert), self.product)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (torch.bmm, Tensor.bmm) or kwargs or not isinstance(args[1], PerExpert):
            raise _unknown(function)
        x_EnI, experts = args
        return torch.stack([experts.product(e, x_nI) for e, x_nI in enumerate(x_EnI)])


class _Expert:
    """One expert's weight, however it is stored: `F.linear` of it or `x @ it` is the product."""

    def __init__(self, expert: int, product: Product) -> None:
        self._expert, self._product = expert, product

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.linear:
            x, expert = args[:2]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
        elif function in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm) and not kwargs:
            (x, expert), bias = args, None
        else:
            raise _unknown(function)
        if not isinstance(expert, _Expert):
            raise _unknown(function)
        y = expert._product(expert._expert, x)
        return y if bias is None else y + bias


def _unknown(function: Any) -> UPQError:
    name = getattr(function, "__name__", function)
    return UPQError(
        f"the model's experts are computed by {name}, and UPQ knows products with one expert at a time (linear, "
        "matmul) or with all (bmm); this class cannot be quantised yet"
    )


def stand_in(experts: nn.Module, leaf: str, weight: Any) -> None:
    """`weight` takes the place of a parameter of an experts module, which loops over its experts from here on."""
    experts._parameters.pop(leaf, None)
    if isinstance(weight, nn.Module):
        experts.add_module(leaf, weight)
    else:
        experts.__dict__[leaf] = weight
    loop(experts)


def loop(experts: nn.Module) -> None:
    """An experts module computes one expert after the other, and no product over all."""
    config: Any = vars(experts).get("config")
    if getattr(config, "_experts_implementation", "eager") != "eager":
        config = copy.copy(config)  # the model's own is shared with other modules
        config._experts_implementation_internal = "eager"
        experts.config = config

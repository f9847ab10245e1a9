"""A device that is far away, without one: tensors on `meta` stand for those of a GPU.

They have no values: what is read is 1 and a mask picks everything. An operation on tensors of both sides fails, as on a
GPU. Scalars and indices may come from the CPU, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

_aten = torch.ops.aten
_READ = (_aten._local_scalar_dense.default, _aten.item.default, _aten.is_nonzero.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)


class FarError(AssertionError):
    pass


class _Far(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        far = [x for x in tensors if x.is_meta]
        if not far:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            with self:  # here operations come undivided
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func in _READ:
            boolean = args[0].dtype == torch.bool or func is _aten.is_nonzero.default
            return True if boolean else 1.0 if args[0].is_floating_point() else 1
        if func is _aten.equal.default:
            return True
        if func is _aten._to_copy.default:  # to the CPU, or from it
            device = torch.device(kwargs.get("device") or args[0].device)
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.ones(args[0].shape, dtype=dtype, device=device)
        if func is _aten.copy_.default:
            return args[0] if args[0].is_meta else args[0].fill_(1)
        if func is _aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device="meta")
        near = [x for x in tensors if not x.is_meta and x.dim()]
        if func in _INDEXED and args[0].is_meta:
            values = [x for x in tree_iter(args[2:]) if isinstance(x, Tensor)]
            if all(x.is_meta or not x.dim() for x in values):
                near = []
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        if near:
            raise FarError(f"{func} mixes {[f'{tuple(x.shape)} {x.device}' for x in tensors]}")
        args, kwargs = tree_map(_sent, (args, kwargs))
        return func(*args, **kwargs)


def _sent(value: Any) -> Any:
    """A scalar of the CPU, where it is wanted."""
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) and not value.is_meta else value


def _places(index: Tensor | None) -> list[Tensor | None]:
    if index is None:
        return [None]
    if index.dtype == torch.bool:  # a mask: a place in each of its dimensions
        return [torch.empty(index.numel(), dtype=torch.long, device="meta")] * index.dim()
    return [torch.empty(index.shape, dtype=index.dtype, device="meta")]


@contextmanager
def far_away() -> Iterator[str]:
    """Gives the device's name."""
    with _Far():
        yield "meta"

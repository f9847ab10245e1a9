"""What code would need, found out by running it on tensors that have shapes but neither memory nor values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

SMALL = 32 * 2**20  # glibc takes larger blocks from the system and gives them back at once (M_MMAP_THRESHOLD)
_aten = torch.ops.aten
# Where a mask picks rows, how many there are depends on its values.
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
# Attention as the CPU computes it is not in torch's registry; the arguments begin with (gradient,) query, key, value.
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass
class Tally:
    """Bytes of the tensors that are alive, their peak so far, and the work that was done.

    Work is what bounds an operation: floating-point operations of products, bytes read and written by all others.
    `loose` is the part of the peak in tensors of up to SMALL bytes that were made since the last restart.
    """

    live: int = 0
    peak: int = 0
    loose: int = 0
    flops: float = 0.0
    moved: float = 0.0
    restarts: int = 0
    loose_now: int = 0

    def restart(self) -> None:
        """Let the peak be that of what comes from here on."""
        self.peak = self.live
        self.restarts += 1
        self.loose = self.loose_now = 0

    def add(self, size: int) -> None:
        self.live += size
        self.loose_now += size if abs(size) <= SMALL else 0
        if self.live > self.peak:
            self.peak, self.loose = self.live, self.loose_now


@contextmanager
def imagined() -> Iterator[Tally]:
    """Tensors made within have no values: one that is read is 1 (or True), and a mask picks everything.

    Those made before may be read, and are not counted.
    """
    tally = Tally()
    with FakeTensorMode(allow_non_fake_inputs=True), _Counting(tally, values=False):
        yield tally


@contextmanager
def counted() -> Iterator[Tally]:
    """Counts what is done within, on real tensors too; those made before do not count as alive."""
    tally = Tally()
    with _Counting(tally, values=True):
        yield tally


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, that of the backward pass too, and how long each storage lives."""

    def __init__(self, tally: Tally, *, values: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tally, self._values = tally, values
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        kwargs = kwargs or {}
        if not self._values:
            if func is _aten.equal.default:
                return True
            if func is _aten._local_scalar_dense.default:
                return _one(args[0])
            if func in _INDEXED:
                args = (args[0], _all_of_masks(args[1]), *args[2:])
            if func is _aten.nonzero.default:
                func, args, kwargs = torch.empty, (args[0].numel(), args[0].dim()), {"dtype": torch.long}
        if torch.is_inference_mode_enabled() and getattr(func, "namespace", "") == "aten":
            with self:  # here products come undivided
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        made = [tensor for tensor in tree_iter(out) if isinstance(tensor, Tensor)]
        for tensor in made:
            self._keep(tensor)
        if made and isinstance(func, torch._ops.OpOverload):
            self._count(func, args, kwargs, out)
        return out

    def _keep(self, tensor: Tensor) -> None:
        # Layouts take no memory. Of 8-bit moments, the tensors within have been seen themselves.
        if tensor.device.type == "meta" or is_traceable_wrapper_subclass(tensor):
            return
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._tally.add(size)
        weakref.finalize(storage, self._free, size, self._tally.restarts)

    def _free(self, size: int, restarts: int) -> None:
        if restarts == self._tally.restarts:
            self._tally.add(-size)
        else:
            self._tally.live -= size

    def _count(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func is _ATTENTION:
            self._tally.flops += sdpa_flop_count(*(x.shape for x in args[:3]))  # type: ignore[no-untyped-call]
        elif func is _ATTENTION_BACKWARD:
            shapes = (x.shape for x in args[:4])
            self._tally.flops += sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
        elif func.overloadpacket in flop_registry:
            self._tally.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        elif not func.is_view:
            self._tally.moved += sum(x.nbytes for x in tree_iter((args, kwargs, out)) if isinstance(x, Tensor))


def _one(tensor: Tensor) -> float | int | bool:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _all_of_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            places = torch.empty(index.numel(), dtype=torch.long, device=index.device)
            found += [places] * index.dim()
    return found

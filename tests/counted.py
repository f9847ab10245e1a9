"""Memory and work of code that runs: every tensor's life is followed, and every operation counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
# Attention as the CPU computes it is not in torch's registry; the arguments begin with (gradient,) query, key, value.
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: (3, sdpa_flop_count),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (4, sdpa_backward_flop_count),
}


@dataclass
class Tally:
    """Bytes of the tensors that are alive, their peak since the last restart, and flops of products."""

    live: int = 0
    peak: int = 0
    flops: float = 0.0

    def restart(self) -> None:
        self.peak = self.live

    def add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def counted() -> Iterator[Tally]:
    """Counts what is done in the context. Tensors that were there at its start do not count as alive."""
    tally = Tally()
    with _Counting(tally):
        yield tally


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, tally: Tally) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tally = tally
        self._alive: dict[int, Any] = {}  # storages by address

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, out = kwargs or {}, NotImplemented
        if func is not _DEVICE and torch.is_inference_mode_enabled() and getattr(func, "namespace", "") == "aten":
            with self:  # a product comes whole in inference mode: count its parts
                out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func in _ATTENTION:
            number, flops = _ATTENTION[func]
            self._tally.flops += flops(*(x.shape for x in args[:number]))
        elif getattr(func, "overloadpacket", None) in flop_registry:
            self._tally.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        for tensor in tree_iter(out):
            # Layouts take no memory; the tensors within 8-bit moments have been seen themselves.
            if (
                isinstance(tensor, Tensor)
                and tensor.device.type != "meta"
                and not is_traceable_wrapper_subclass(tensor)
            ):
                self._follow(tensor.untyped_storage())

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._alive:
            return

        def free(_: object) -> None:
            del self._alive[address]
            self._tally.add(-size)

        self._alive[address] = weakref.ref(storage, free)
        self._tally.add(size)

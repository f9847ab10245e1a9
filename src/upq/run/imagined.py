"""What code would need, found out by running it on tensors that have shapes but neither memory nor values."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from upq.run.answers import Answers, Teller, Work, question

SMALL = 32 * 2**20  # glibc takes larger blocks from the system and gives them back at once (M_MMAP_THRESHOLD)
_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
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
def imagined(answers: Answers | None = None) -> Iterator[Tally]:
    """Tensors made within have no values: one that is read is 1 (or True), and a mask picks everything.

    Those made before may be read, and are not counted. What `answers` has is not found out again.
    """
    tally, mode = Tally(), FakeTensorMode(allow_non_fake_inputs=True)
    mode.cache_enabled = False  # it would hold what is in `answers`
    with mode, _Imagining(tally, mode, Answers() if answers is None else answers):
        yield tally


@contextmanager
def counted() -> Iterator[Tally]:
    """Counts what is done within, on real tensors too; those made before do not count as alive."""
    tally = Tally()
    with _Counting(tally):
        yield tally


class _Alive(weakref.ref[Any]):
    """A storage, until it goes."""

    __slots__ = ("address", "restarts", "size")
    address: int
    restarts: int  # of the tally, when it was made
    size: int


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, that of the backward pass too, and how long each storage lives."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tally = tally
        self._alive: dict[int, _Alive] = {}  # by address

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and its guard took 0.2 s of a plan

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _DEVICE:
            return func(*args)
        kwargs = kwargs or {}
        out = self._divided(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
            self._count(_storages(out), _work(func, args, kwargs, out))
        return out

    def _divided(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation by its parts, where it would come whole: in inference mode products do."""
        if not torch.is_inference_mode_enabled() or getattr(func, "namespace", "") != "aten":
            return NotImplemented
        with self:
            return func.decompose(*args, **kwargs)

    def _count(self, storages: Iterable[torch.UntypedStorage], work: Work) -> None:
        tally = self._tally
        tally.flops += work[0]
        tally.moved += work[1]
        for storage in storages:
            address = storage._cdata
            if address not in self._alive:
                alive = self._alive[address] = _Alive(storage, self._free)
                alive.address, alive.restarts, alive.size = address, tally.restarts, storage.nbytes()
                tally.add(alive.size)

    def _free(self, alive: _Alive) -> None:
        del self._alive[alive.address]
        if alive.restarts == self._tally.restarts:
            self._tally.add(-alive.size)
        else:
            self._tally.live -= alive.size


class _Imagining(_Counting):  # type: ignore[no-untyped-call]
    """Answers where there are no values."""

    def __init__(self, tally: Tally, mode: FakeTensorMode, answers: Answers) -> None:
        super().__init__(tally)
        self._answers, self._teller = answers, Teller(mode)
        self._within = False  # an operation on a tensor that is made of tensors

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _DEVICE:  # torch asks by itself, more than once an operation
            return args[0].fake_device if type(args[0]) is FakeTensor else func(*args)
        if func is _aten.equal.default:
            return True
        if func is _aten._local_scalar_dense.default:
            return _one(args[0])
        kwargs = kwargs or {}
        if func in _INDEXED:
            args = (args[0], _all_of_masks(args[1]), *args[2:])
        elif func is _aten.nonzero.default:
            func, args, kwargs = torch.empty, (args[0].numel(), args[0].dim()), {"dtype": torch.long}
        for kind in types:
            if kind is not FakeTensor:
                return self._by_its_own(func, types, args, kwargs)
        asked = question(func, args, kwargs)
        answer = None if asked is None else self._answers.known(asked)
        if asked is not None and answer is not None:
            out, new = self._teller.tell(answer, asked.tensors)
            if not self._within:
                self._count([tensor.untyped_storage() for tensor in new], answer.work)
            return out
        out = self._divided(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
            work = _work(func, args, kwargs, out)
            if asked is not None:
                self._answers.learn(asked, out, question(func, args, kwargs), work)
            if not self._within:
                self._count(_storages(out), work)
        return out

    def _by_its_own(self, func: Any, types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Done by a tensor's own class, such as that of 8-bit moments. What it does in there is not counted.

        On a GPU torchao compiles it to one kernel; on the CPU that leaves out 0.3 GB of the 78 of an 8B.
        """
        if self._within:
            return NotImplemented  # so that torch asks the class
        self._within = True
        try:
            with self:
                out = func(*args, **kwargs)
        finally:
            self._within = False
        self._count(_storages(out), _work(func, args, kwargs, out))
        return out


def _storages(out: Any) -> Iterator[torch.UntypedStorage]:
    """What takes memory of it: layouts do not, and of 8-bit moments the tensors within have been seen themselves."""
    for tensor in tree_iter(out):
        if isinstance(tensor, Tensor) and tensor.device.type != "meta" and not is_traceable_wrapper_subclass(tensor):
            yield tensor.untyped_storage()


def _work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    """Of a product its operations, of all others the bytes."""
    if not isinstance(func, torch._ops.OpOverload) or not any(isinstance(x, Tensor) for x in tree_iter(out)):
        return 0.0, 0.0
    if func is _ATTENTION:
        return sdpa_flop_count(*(x.shape for x in args[:3])), 0.0  # type: ignore[no-untyped-call]
    if func is _ATTENTION_BACKWARD:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4])), 0.0  # type: ignore[no-untyped-call]
    if func.overloadpacket in flop_registry:
        return flop_registry[func.overloadpacket](*args, **kwargs, out_val=out), 0.0
    if func.is_view:
        return 0.0, 0.0
    return 0.0, sum(x.nbytes for x in tree_iter((args, kwargs, out)) if isinstance(x, Tensor))


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

"""What an operation gives on tensors without values, found out once for each form of its arguments.

FakeTensorMode finds out each time, in 100 to 120 µs for all that it remembers; from here it takes 14 to 21. The plan of
a 1B asked 104,000 times, with 2,000 different questions.

Law (tests/test_plan.py): what is told has the form and the storage of what would have been found out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Work = tuple[float, float]  # floating-point operations, bytes moved
_META = torch.device("meta")
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


class Form(NamedTuple):
    """Of a tensor that comes out: argument `of` seen from `offset` elements on or, where that is None, a new one."""

    of: int | None
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Answer(NamedTuple):
    """What comes out, each a form or the number of the argument that it is, and the operation's work."""

    outs: tuple[Form | int, ...]
    sequence: type | None  # that they come in
    work: Work


class Question(NamedTuple):
    """An operation and the form of its arguments: equal keys have equal answers."""

    key: tuple[Any, ...]
    tensors: list[FakeTensor]


class Answers:
    """Holds forms and no tensors: one will do for all that is imagined."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Answer] = {}

    def known(self, question: Question) -> Answer | None:
        return self._known.get(question.key)

    def learn(self, question: Question, out: Any, after: Question | None, work: Work) -> None:
        """`after` is the question as it would be asked now: what changes an argument's form is not learnt."""
        sequence = type(out) if isinstance(out, (list, tuple)) else None
        outs = out if sequence else () if out is None else (out,)
        forms = [_form(each, question.tensors) for each in outs]
        if after is not None and after.key == question.key and None not in forms:
            self._known[question.key] = Answer(tuple(form for form in forms if form is not None), sequence, work)


def question(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Question | None:
    """None where the answer hangs on more than the arguments' form."""
    # The offset that as_strided is given counts from where the storage begins, and not its argument.
    if not isinstance(func, torch._ops.OpOverload) or func is torch.ops.aten.as_strided.default:
        return None
    key: list[Any] = [id(func), torch.get_default_dtype(), torch.is_inference_mode_enabled()]
    tensors: list[FakeTensor] = []
    if not _describe(args, key, tensors):
        return None
    if kwargs:
        key += kwargs
        if not _describe(kwargs.values(), key, tensors):
            return None
    if len(tensors) > 1:
        numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        if len(numbers) < len(tensors):  # a tensor that is two arguments may come out as either
            key += [numbers[id(tensor)] for tensor in tensors]
    return Question(tuple(key), tensors)


class Teller:
    """Makes the tensors of an answer, in one FakeTensorMode."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._attributes: dict[torch.device, dict[str, Any]] = {}  # of a new FakeTensor; to make one takes it 9 µs

    def tell(self, answer: Answer, tensors: list[FakeTensor]) -> tuple[Any, list[FakeTensor]]:
        """What the operation returns, and what of it takes memory that was not there."""
        outs: list[FakeTensor] = []
        new: list[FakeTensor] = []
        for form in answer.outs:
            if isinstance(form, int):
                outs.append(tensors[form])
                continue
            of, offset, shape, stride, dtype, device = form
            with torch._C._DisableTorchDispatch():
                if of is None:
                    bare = torch.empty_strided(shape, stride, dtype=dtype, device=_META)
                else:
                    base = tensors[of]
                    bare = torch.empty(0, dtype=dtype, device=_META)
                    bare.set_(base.untyped_storage(), base.storage_offset() + offset, shape, stride)
            attributes = self._attributes.get(device)
            if attributes is None:
                attributes = self._attributes[device] = dict(vars(FakeTensor(self._mode, bare, device)))
            tensor = Tensor._make_subclass(
                FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=device
            )
            tensor.__dict__.update(attributes)
            outs.append(tensor)
            if of is None and device != _META:
                new.append(tensor)
        return (outs[0] if outs else None) if answer.sequence is None else answer.sequence(outs), new


def _describe(values: Iterable[Any], key: list[Any], tensors: list[FakeTensor]) -> bool:
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            key.append((value.shape, value.stride(), value.dtype, value.fake_device, value.is_inference()))
            tensors.append(value)
        elif kind in _PLAIN:
            key += (kind, value)  # 1, 1.0 and True are equal
        elif kind is list or kind is tuple:
            key.append(len(value))
            if not _describe(value, key, tensors):
                return False
        else:
            return False
    return True


def _form(out: Any, tensors: list[FakeTensor]) -> Form | int | None:
    """None where a form does not say it all."""
    for number, tensor in enumerate(tensors):
        if out is tensor:
            return number
    if type(out) is not FakeTensor or out.requires_grad or out.is_conj() or out.is_neg():
        return None
    if out.is_inference() != torch.is_inference_mode_enabled():  # as a view of what was there before
        return None
    form = Form(None, 0, tuple(out.shape), out.stride(), out.dtype, out.fake_device)
    storage, start = out.untyped_storage(), int(out.storage_offset())
    for number, tensor in enumerate(tensors):
        if tensor.untyped_storage()._cdata == storage._cdata:
            same = out.dtype == tensor.dtype
            return form._replace(of=number, offset=start - int(tensor.storage_offset())) if same else None
    last = sum((n - 1) * step for n, step in zip(form.shape, form.stride, strict=True))
    whole = (1 + last) * out.itemsize if out.numel() else 0
    return form if start == 0 and storage.nbytes() == whole else None

"""Runs the decoder blocks of a model in order, one of them in memory at a time. The only loop over decoder blocks.

A block is called as the model's own forward calls it for the same rows. To find its arguments, the forward is replayed
on a skeleton whose blocks have no weights: each block hands on what it gets, and the one before block i hands on the
hidden states that are known.

Shape suffixes: N rows, T tokens, H hidden size, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_iter, tree_map
from transformers import PreTrainedModel

from upq.core.errors import UPQError
from upq.model.activations import Activations, Allocate, batches, in_memory
from upq.model.layout import Layout, block_list
from upq.model.matrices import Matrix
from upq.model.source import Source
from upq.model.tables import Mode, looking_up, tables

Rows = slice | Tensor  # a stretch of rows, or their indices (B,)
_Forward = Callable[..., Any]
_MOST_ELEMENTS = 4  # of what a block returns: hidden states, attention weights, a cache


@dataclass(frozen=True)
class Call:
    """What a block is called with: the hidden states, and all other arguments."""

    hidden_BTH: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Replay:
    """The forward of a model without its blocks.

    Law (tests/test_walker.py): blocks that are called with `call` give, one after the other, the hidden states of the
    whole model, bit for bit.
    Raises UPQError for a model whose blocks do not run once each, in order.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.dtype = source.dtype
        model = source.skeleton()
        self._decoder = model.get_submodule(source.layout.decoder)
        self._blocks = list(block_list(model, source.layout))
        self._tables = tables(self._decoder)
        self._elements = 0
        ids_BT = torch.zeros(1, 2, dtype=torch.long)
        with torch.no_grad(), looking_up(self._tables, "nan"):  # what is made of embeddings holds NaN
            self._elements = _elements(lambda: self._forward(ids_BT), self._blocks)
            calls, others = self._calls(ids_BT), self._calls(ids_BT + 1)
        shape = calls[0].hidden_BTH.shape
        if shape[:2] != ids_BT.shape:
            raise UPQError(
                f"{source.path}: its decoder blocks take hidden states of shape {tuple(shape)} for one row of two "
                "tokens; UPQ reads models whose blocks take (rows, tokens, …)"
            )
        self.width = shape[2:]  # of a hidden state
        # Whether all arguments but the hidden states follow from the shape of a batch. A replay per batch is then one
        # per batch size.
        handed_on = all(call.hidden_BTH is calls[0].hidden_BTH for call in calls)
        fixed = not any(_depends_on_values(call, other) for call, other in zip(calls, others, strict=True))
        self.by_shape = bool(self._tables) and handed_on and fixed
        self.handed_on = handed_on  # a block gets what the one before it wrote, as it is

    @torch.no_grad()
    def call(self, index: int, ids_BT: Tensor, hidden_BTH: Tensor | None = None) -> Call:
        """How block `index` is called for tokens (B, T); `hidden_BTH` is what the block before it wrote."""
        # Where only the shape counts, each block is saved a read of the embeddings.
        mode: Mode = "zeros" if self.by_shape and hidden_BTH is not None else "rows"
        with looking_up(self._tables, mode):
            call = self._calls(ids_BT, index, hidden_BTH)[index]
        return Call(hidden_BTH, call.args, call.kwargs) if mode == "zeros" and hidden_BTH is not None else call

    @torch.no_grad()
    def finish(self, ids_BT: Tensor, hidden_BTH: Tensor) -> Tensor:
        """What the decoder makes of the last block's output (B, T, H): its final norm, and whatever else it does."""
        with looking_up(self._tables, "zeros" if self.by_shape else "rows"):
            last = len(self._blocks)
            with _forwards(self._blocks, self._stand_in([], [], last, hidden_BTH)):
                out: Tensor = self._forward(ids_BT).last_hidden_state
        return out

    def _forward(self, ids_BT: Tensor) -> Any:
        return self._decoder(input_ids=ids_BT.to(self._source.device), use_cache=False)

    def _calls(self, ids_BT: Tensor, index: int = 0, hidden_BTH: Tensor | None = None) -> list[Call]:
        order, calls = list[int](), list[Call]()
        with _forwards(self._blocks, self._stand_in(order, calls, index, hidden_BTH)):
            self._forward(ids_BT)
        if order != list(range(len(self._blocks))):
            raise UPQError(
                f"{self._source.path}: its {len(self._blocks)} decoder blocks run in the order {order}; UPQ reads "
                "models whose blocks run once each, in order"
            )
        return calls

    def _stand_in(
        self, order: list[int], calls: list[Call], index: int, hidden_BTH: Tensor | None
    ) -> Callable[[int], _Forward]:
        """The block before `index` hands on the hidden states that are known; all others what they get."""

        def stand_in(at: int) -> _Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                x_BTH, args, kwargs = hidden_first(args, kwargs)
                order.append(at)
                calls.append(Call(x_BTH, args, kwargs))
                out_BTH = hidden_BTH if at == index - 1 and hidden_BTH is not None else x_BTH
                return _as(out_BTH, self._elements)

            return forward

        return stand_in


@dataclass(frozen=True)
class Step:
    """One decoder block, and the hidden states that go through it. The caller reads the block.

    `states` are one or more streams of hidden states: what the blocks before this one wrote, until `advance`.
    """

    index: int
    states: tuple[Activations, ...]
    tokens_NT: Tensor
    matrices: tuple[Matrix, ...]  # the block's weights that become codes
    replay: Replay | None = None  # None without streams
    batch_size: int = 8
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    # By stream and batch, the values that blocks hand on beside the hidden states.
    carried: tuple[dict[tuple[int, int], dict[str, Any]], ...] = ()
    # Calls by number of rows, where they follow from it. Without hidden states.
    _known: dict[int, Call] = field(default_factory=dict)

    def run(
        self,
        block: nn.Module,
        rows: Rows,
        *,
        weights: dict[str, Tensor] | None = None,
        stream: int = 0,
        hidden_BTH: Tensor | None = None,
    ) -> Tensor:
        """The block's output (B, T, H) for some rows of a stream, with `weights` in place of its own.

        `hidden_BTH`: in place of what the stream has. Differentiable with respect to `weights` (E·O, I), by their
        names, and `hidden_BTH`. Raises UPQError where blocks hand on more than hidden states, and these are given.
        """
        return self._run(block, self._call(rows, stream, hidden_BTH), weights)

    @torch.no_grad()
    def advance(self, block: nn.Module, *, stream: int = 0) -> None:
        """Put the block's outputs in the place of its inputs, in their order and batches (a rerun is bit-identical)."""
        states_NTH = self.states[stream]
        for rows in batches(len(states_NTH), self.batch_size):
            call = self._call(rows, stream)
            states_NTH[rows] = self._run(block, call, None).float()
            if mappings := {name: each for name, each in call.kwargs.items() if isinstance(each, MutableMapping)}:
                self.carried[stream][rows.start, rows.stop] = mappings

    def forget(self) -> None:
        """Free what is kept of the calls: the block is done with."""
        self._known.clear()

    def _run(self, block: nn.Module, call: Call, weights: dict[str, Tensor] | None) -> Tensor:
        args = (call.hidden_BTH, *call.args)
        with self.autocast():
            if weights is None:
                return hidden_states(block(*args, **call.kwargs))
            named = {m.parameter: m.shaped(weights[m.name]) for m in self.matrices if m.name in weights}
            return hidden_states(functional_call(block, named, args, call.kwargs))

    def _call(self, rows: Rows, stream: int, given_BTH: Tensor | None = None) -> Call:
        replay = self.replay
        assert replay is not None
        hidden_BTH = (self.states[stream][rows] if given_BTH is None else given_BTH).to(replay.dtype)
        if replay.by_shape:
            known = self._known.get(len(hidden_BTH))
            if known is None:
                known = replay.call(self.index, self.tokens_NT[rows], hidden_BTH.detach())
                self._known[len(hidden_BTH)] = Call(hidden_BTH.detach()[:0], known.args, known.kwargs)
            return Call(hidden_BTH, known.args, known.kwargs)
        call = replay.call(self.index, self.tokens_NT[rows], hidden_BTH.detach())
        if given_BTH is not None:
            if not replay.handed_on or any(isinstance(each, MutableMapping) for each in call.kwargs.values()):
                raise UPQError(
                    "blocks of this model hand on more than hidden states: no window, no annealing; "
                    "set window=1 and annealing=0"
                )
            return Call(hidden_BTH, call.args, call.kwargs)
        carried = self.carried[stream] if self.index else {}
        if carried:
            for name, handed_on in _rows_of(carried, rows).items():
                call.kwargs[name].update(handed_on)
        return call


def walk(
    source: Source,
    tokens_NT: Tensor,
    *,
    streams: int = 1,
    batch_size: int = 8,
    allocate: Allocate = in_memory,
    bf16: bool = False,
    replay: Replay | None = None,
) -> Iterator[Step]:
    """A step for each decoder block of `source`, in order. The embeddings are read before this returns.

    `streams`: how many copies of the hidden states go through the blocks; none where only the blocks matter.
    `bf16`: blocks are called in autocast; what they are given and give stays float32. `replay` spares a caller who
    walks often a skeleton each time (0.06 s for 5 blocks).
    """
    states: tuple[Activations, ...] = ()
    if streams:
        replay = replay or Replay(source)
        shape = torch.Size((*tokens_NT.shape, *replay.width))
        states = tuple(allocate(shape, source.device) for _ in range(streams))
        for rows in batches(len(tokens_NT), batch_size):
            hidden_BTH = replay.call(0, tokens_NT[rows]).hidden_BTH.float()
            for states_NTH in states:
                states_NTH[rows] = hidden_BTH
    carried = tuple(dict[tuple[int, int], dict[str, Any]]() for _ in states)

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(source.device.type, torch.bfloat16) if bf16 else nullcontext()

    return (
        Step(i, states, tokens_NT, source.matrices(i), replay, batch_size, autocast, carried)
        for i in range(len(source))
    )


def hidden_states(output: Any) -> Tensor:
    """Of what a block returns: a tensor, or a tuple that begins with it."""
    hidden_BTH: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden_BTH


@contextmanager
def _forwards(blocks: Sequence[nn.Module], stand_in: Callable[[int], _Forward]) -> Iterator[None]:
    """Within, `stand_in(i)` is the forward of block i. All else that a decoder reads of its blocks stays."""
    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def hidden_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states of a block's call, which some models name, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: each for name, each in kwargs.items() if name != "hidden_states"}


@contextmanager
def only_block(model: PreTrainedModel, layout: Layout, at: int) -> Iterator[None]:
    """Within, the decoder's forward runs block `at` alone: the others hand on what they get."""
    blocks, decoder = list(block_list(model, layout)), model.get_submodule(layout.decoder)
    ids_BT = torch.zeros(1, 2, dtype=torch.long)
    with torch.no_grad():
        elements = _elements(lambda: decoder(input_ids=ids_BT, use_cache=False), blocks)

    def stand_in(_at: int) -> _Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x_BTH, _, _ = hidden_first(args, kwargs)
            return _as(x_BTH, elements)

        return forward

    with _forwards([block for index, block in enumerate(blocks) if index != at], stand_in):
        yield


def _elements(run: Callable[[], object], blocks: Sequence[nn.Module]) -> int:
    """How many elements the decoder wants of what a block returns; 0: a tensor, and no tuple that begins with it.

    `run` is a forward pass of the decoder.
    """
    for elements in range(_MOST_ELEMENTS):
        first, fewer = list[Tensor](), False

        def stand_in(_at: int, elements: int = elements, first: list[Tensor] = first) -> _Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal fewer
                x_BTH, _, _ = hidden_first(args, kwargs)
                fewer = fewer or (bool(first) and x_BTH.dim() < first[0].dim())  # element 0 of a tensor
                first.append(x_BTH)
                return _as(first[0], elements)

            return forward

        try:
            with _forwards(blocks, stand_in):
                run()
        except (ValueError, TypeError, IndexError, AttributeError):
            if elements == _MOST_ELEMENTS - 1:
                raise
            continue
        if not fewer:
            return elements
    raise AssertionError("a tuple is not taken for a tensor")


def _as(hidden_BTH: Tensor, elements: int) -> Any:
    return (hidden_BTH, *[None] * (elements - 1)) if elements else hidden_BTH


def _depends_on_values(call: Call, other: Call) -> bool:
    """Whether other arguments than the hidden states follow from more than the shape of a batch.

    NaN shows what is made of embeddings. `other` is the call for other tokens of the same shape.
    """
    if any(isinstance(each, MutableMapping) for each in call.kwargs.values()):  # blocks write into it
        return True
    for each, again in zip(tree_iter((call.args, call.kwargs)), tree_iter((other.args, other.kwargs)), strict=True):
        if isinstance(each, Tensor):
            if not torch.equal(each, again):  # of NaN too
                return True
        elif not isinstance(each, int | float | str | torch.dtype | type(None)):
            return True
    return False


def _rows_of(carried: dict[tuple[int, int], dict[str, Any]], rows: Rows) -> dict[str, Any]:
    """Of what blocks have handed on by batch, that of some rows."""
    if isinstance(rows, slice) and (rows.start, rows.stop) in carried:
        return carried[rows.start, rows.stop]
    indices = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
    parts = []
    for row in indices:
        start, stop = next(batch for batch in carried if batch[0] <= row < batch[1])
        at, size = row - start, stop - start
        parts.append(
            tree_map(
                lambda each, at=at, size=size: (
                    each[at : at + 1] if isinstance(each, Tensor) and each.dim() and len(each) == size else each
                ),
                {name: dict(each) for name, each in carried[start, stop].items()},
            )
        )
    return tree_map(lambda *each: torch.cat(each) if isinstance(each[0], Tensor) else each[0], *parts)  # type: ignore[no-any-return]

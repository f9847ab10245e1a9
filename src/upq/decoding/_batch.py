"""Many texts at a time through the compiled decoder: one that ends leaves, the next one takes its place.

Law (tests/test_decoding_batch.py): a text is that which it would be alone, bit for bit, whatever is written beside it.

Shape suffixes: B = texts, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from upq.core.errors import UPQError
from upq.decoding._parts import COMPILED, Unsuitable, parts
from upq.decoding._session import shared
from upq.kernels import compute, cpu
from upq.kernels.decoder import Decoder, Parts, Stored
from upq.text.generation import Request, next_tokens

_PORTION = 512  # tokens of prompts that a step reads: what is written waits for no longer prompt

K = TypeVar("K")


@dataclass(slots=True)
class _Slot(Generic[K]):
    """A place for one text in the decoder."""

    text: int
    cached: list[int] = field(default_factory=list)  # tokens whose keys and values are there
    request: Request[K] | None = None
    todo: list[int] = field(default_factory=list)  # not there yet
    written: list[int] = field(default_factory=list)
    place: int = 0  # in the order in which texts were added


class Batch(Generic[K]):
    """`size` texts at a time. A prompt that begins as the text before in its place did is computed from there on."""

    def __init__(
        self,
        parts: Parts,
        *,
        size: int,
        compute: cpu.Compute,
        context: int | None = None,
        cache: Stored = "float32",
    ) -> None:
        """`context`: positions that a prompt and its answer may take. Raises UPQError."""
        if size < 1:
            raise UPQError(f"a batch of {size} texts; at least one is written at a time")
        self._decoder = Decoder(parts, cache=cache)
        self._compute: cpu.Compute = compute
        self._context = context
        self._slots = [_Slot[K](self._decoder.open()) for _ in range(size)]
        self._added = 0

    @property
    def cached_bytes(self) -> int:
        """Memory of all keys and values."""
        return self._decoder.cached_bytes

    @property
    def free(self) -> int:
        """Texts that can be added."""
        return sum(slot.request is None for slot in self._slots)

    @property
    def busy(self) -> bool:
        return any(slot.request is not None for slot in self._slots)

    def add(self, request: Request[K]) -> None:
        """Begin a text; there must be a free place. Raises UPQError."""
        if not request.ids:
            raise UPQError("an empty prompt: a text begins with one token or more")
        if self._context is not None and len(request.ids) + request.limit > self._context:
            raise UPQError(
                f"a prompt of {len(request.ids)} tokens and {request.limit} to write are more than the model's context"
                f" of {self._context}; shorten one of them"
            )
        places = [slot for slot in self._slots if slot.request is None]
        slot = max(places, key=lambda place: shared(place.cached, request.ids))
        kept = min(shared(slot.cached, request.ids), len(request.ids) - 1)
        self._decoder.truncate(slot.text, kept)
        del slot.cached[kept:]
        slot.request, slot.todo, slot.written = request, list(request.ids[kept:]), []
        slot.place, self._added = self._added, self._added + 1

    def step(self) -> Iterator[tuple[K, list[int]]]:
        """One token for every text whose prompt is read. Yields those that end, with the tokens that were written."""
        portions, room = dict[int, list[int]](), _PORTION
        # Prompts in the order in which they came: by slot, the last ones would wait for as long as others come.
        for slot in sorted((slot for slot in self._slots if slot.todo), key=lambda slot: slot.place):
            if slot.written:
                portions[slot.text] = slot.todo[:]
            elif room:
                portions[slot.text] = slot.todo[:room]
                room -= len(portions[slot.text])
        if not portions:
            return
        logits_BV = self._decoder.forward(portions, compute=self._compute)
        by_text = {slot.text: slot for slot in self._slots}
        ready = list[tuple[int, _Slot[K]]]()
        for row, (text, portion) in enumerate(portions.items()):
            slot = by_text[text]
            slot.cached += portion
            del slot.todo[: len(portion)]
            if not slot.todo:
                ready.append((row, slot))
        if not ready:
            return
        rows_BV = logits_BV if len(ready) == len(portions) else logits_BV[[row for row, _ in ready]]
        requests = [slot.request for _, slot in ready if slot.request is not None]
        tokens = next_tokens(rows_BV, [r.sampling for r in requests], [len(slot.written) for _, slot in ready])
        for (_, slot), request, token in zip(ready, requests, tokens, strict=True):
            slot.written.append(token)
            if len(slot.written) >= request.limit or request.over(slot.written):
                slot.request = None
                yield request.key, slot.written
            else:
                slot.todo = [token]

    def write(self, requests: Iterable[Request[K]]) -> Iterator[tuple[K, list[int]]]:
        """All of `requests`, which are drawn as places become free; in the order in which they end."""
        waiting = iter(requests)
        more = True
        while more or self.busy:
            while more and self.free:
                request = next(waiting, None)
                if request is None:
                    more = False
                else:
                    self.add(request)
            yield from self.step()


def takes(family: str) -> bool:
    """Whether `batch` takes a model of this `model_type` on a processor, as far as its configuration shows."""
    try:
        cpu.extension()
    except UPQError:
        return False
    return family in COMPILED


def batch(model: Any, *, size: int, context: int | None = None, cache: Stored = "float32") -> Batch[Any]:
    """A batch of `model`, dense or packed, as its weights are now. Raises Unsuitable.

    Where the reference's products are chosen, a model in float32 goes through w2a16: the same weights and activations,
    summed in another order.
    """
    try:
        cpu.extension()
    except UPQError as error:
        raise Unsuitable("the compiled kernels are not there") from error
    how = compute()
    if how == "reference":
        if model.dtype != torch.float32:
            raise Unsuitable(f"the kernels are set to {how}, in {model.dtype}")
        how = "w2a16"
    return Batch(parts(model, dense=True), size=size, compute=how, context=context, cache=cache)

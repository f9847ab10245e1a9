"""The compiled decoder and the tokens in its cache.

Shape suffixes: V = vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from upq.kernels import Weight, compute, cpu
from upq.kernels.decoder import Decoder, Parts

_PORTION = 512  # tokens: between two, Ctrl-C stops the run


class Session:
    """Logits after a text. Only what follows the prefix that it shares with the last text is computed.

    Law (tests/test_decoding.py): the cache changes no bit.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._decoder = Decoder(parts)
        self._text = self._decoder.open()
        self._identity = identity(parts)
        self._ids: list[int] = []
        self._computed_by: tuple[str, str] | None = None

    def is_of(self, parts: Parts) -> bool:
        """Whether it was made of these parts, and nothing has been written to them since."""
        return bool(self._identity == identity(parts))

    def logits_V(self, ids: Sequence[int]) -> Tensor:
        """The logits after `ids`."""
        how = (compute(), cpu.instruction_set())
        kept = shared(self._ids, ids) if how == self._computed_by else 0
        kept = min(kept, len(ids) - 1)  # the last token is computed in any case: its logits are not kept
        self._decoder.truncate(self._text, kept)
        del self._ids[kept:]
        self._computed_by = how
        return self.extend_V(ids[kept:])

    def extend_V(self, ids: Sequence[int]) -> Tensor:
        """The logits after all tokens so far and then `ids`."""
        assert self._computed_by is not None
        assert ids
        for start in range(0, len(ids), _PORTION):
            portion = ids[start : start + _PORTION]
            found_V = self._decoder.forward({self._text: portion}, compute=self._computed_by[0])[0]  # type: ignore[arg-type]
            self._ids += portion
        return found_V

    def forget(self) -> None:
        """Start from nothing."""
        self._computed_by = None


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def identity(value: Any) -> Any:
    """The tensors of a value with their version counters, in a form that can be compared."""
    if isinstance(value, Tensor):
        # .data = … leaves the tensor and its version as they were: `model.to` does that
        return id(value), value.data_ptr(), value.dtype, 0 if value.is_inference() else value._version
    if isinstance(value, Weight):
        return id(value)
    if isinstance(value, tuple):
        return tuple(map(identity, value))
    if dataclasses.is_dataclass(value):
        return tuple(identity(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value

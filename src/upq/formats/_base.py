from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from upq.core.registry import Registry
from upq.core.scheme import QTensor, QuantScheme


class Format(Protocol):
    """Law (tests/test_formats.py): `decode(encode(q), q.scheme, shape) == q` wherever `supports(q.scheme)`."""

    def supports(self, scheme: QuantScheme) -> bool:
        """Whether the layout can hold every QTensor of this scheme exactly."""
        ...

    def encode(self, q: QTensor) -> dict[str, Tensor]:
        """The tensors of one layer, by the name they have below the layer's path."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]) -> QTensor:
        """The value (O, I) that `encode` was given; tensors of another shape are an error that names them."""
        ...


FORMATS: Registry[Format] = Registry("upq.formats", "format")

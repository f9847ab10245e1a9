"""What a transform is: it changes weights of blocks, and of what is beside them, one part at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from upq.core.config import Strict
from upq.core.registry import Registry
from upq.model.source import Source

Run = Callable[[nn.Module, Tensor], Tensor]  # a block and hidden states (B, T, H): what the model's own call gives


class Transform(Protocol):
    """Law (tests/test_transforms.py, over the registry): the transformed model has the logits of the original.

    Each call reads the original's weights: the caller owns the block or frame and writes away what has become of it.
    """

    Config: type[Strict]

    def __init__(self, config: Any) -> None: ...

    def check(self, name: str, source: Source) -> None:
        """Raises UPQError for a model that the transform does not know, from its layout; `name` is the stage's."""

    def unties(self, source: Source) -> bool:
        """Whether the head gets weights of its own."""

    def block(self, index: int, block: nn.Module, source: Source, run: Run) -> None:
        """Change decoder block `index` in place. Raises UPQError where it would no longer compute the same."""

    def frame(self, model: PreTrainedModel, source: Source) -> None:
        """Change embedding, final norm and head in place, of the model without its blocks."""


TRANSFORMS: Registry[type[Transform]] = Registry("upq.transforms", "transform")

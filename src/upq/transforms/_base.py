"""What a transform is: it changes weights of blocks, and of what is beside them, one part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from upq.core.config import Strict
from upq.core.registry import Registry
from upq.model.online import OnlineRotation
from upq.model.source import Source
from upq.model.walker import Step

Run = Callable[[nn.Module, Tensor], Tensor]  # a block and hidden states (B, T, H): what the model's own call gives
Calibrate = Callable[[nn.Module], None]  # runs a block over all calibration rows, as the original's blocks before it
_SAME = 1e-4  # of the largest output: blocks are compared in float32, where 30 of them leave 3e-5 in the logits


class Transform(Protocol):
    """Law (tests/test_transforms.py, over the registry): the transformed model has the logits of the original.

    Each call reads the original's weights: the caller owns the block or frame and writes away what has become of it.
    """

    Config: type[Strict]

    def __init__(self, config: Any) -> None: ...

    @property
    def needs_inputs(self) -> bool:
        """Whether it looks at what calibration rows make of a block."""
        return False

    def check(self, name: str, source: Source) -> None:
        """Raises UPQError for a model that the transform does not know, from its layout; `name` is the stage's."""

    def unties(self, source: Source) -> bool:
        """Whether the head gets weights of its own."""

    @property
    def stays(self) -> str:
        """What is still to be done while the model runs, for the manifest; empty where all folds into weights."""
        return ""

    def choose(self, source: Source, steps: Iterable[Step]) -> dict[str, Any] | None:
        """What it decides from the calibration rows before it changes anything, as JSON types; None: nothing.

        `steps` has one stream, which the caller expects at its end.
        """
        return None

    def settled(self, choice: Mapping[str, Any]) -> Transform:
        """The transform after `choose`."""
        return self

    def online(self, source: Source) -> Mapping[str, OnlineRotation]:
        """By path of a linear, what stays at inference. The weights that `block` leaves hold the inverse."""
        return {}

    def block(self, index: int, block: nn.Module, source: Source, run: Run, calibrate: Calibrate) -> None:
        """Change decoder block `index` in place. Raises UPQError where it would no longer compute the same.

        `calibrate` is for those that `needs_inputs`.
        """

    def frame(self, model: PreTrainedModel, source: Source) -> None:
        """Change embedding, final norm and head in place, of the model without its blocks."""


def same(got: Tensor, expected: Tensor) -> bool:
    """Whether two outputs of a block differ by rounding alone."""
    return bool((got - expected).abs().max() <= _SAME * expected.abs().max())


TRANSFORMS: Registry[type[Transform]] = Registry("upq.transforms", "transform")

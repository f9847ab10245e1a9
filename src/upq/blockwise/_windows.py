"""Windows of several blocks that are solved together (CBQ, arXiv 2312.07950; SliderQuant, arXiv 2603.25284)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor, nn

from upq.blockwise._store import BlockStore
from upq.core.errors import UPQError
from upq.model.walker import Rows, Step


@dataclass(frozen=True, slots=True)
class Order:
    """In which order a walk solves the blocks, and what they read meanwhile."""

    window: int = 1  # blocks that are solved together
    overlap: int = 0  # of them with the next window
    grow: int = 0  # windows at either end that grow from one block to so many (SliderQuant)
    annealing: float = 0.0  # share of the steps in which a block's inputs go over from the original's to the quantised
    apart: bool = False  # every block on the original's inputs: none depends on another

    @property
    def plain(self) -> bool:
        """One block after the other, on the quantised inputs."""
        return self.window == 1 and not self.grow and not self.annealing


def spans(blocks: int, order: Order) -> list[range]:
    """The blocks of each window; starts and ends never go back.

    Raises UPQError for windows that the model is too short for.
    """
    window, overlap, grow = order.window, order.overlap, order.grow
    if window > blocks:
        raise UPQError(f"window={window} is longer than the model, which has {blocks} blocks; lower it")
    if overlap >= window:
        raise UPQError(f"overlap={overlap} must be less than window={window}: each window needs a block of its own")
    if 2 * grow > blocks:
        raise UPQError(f"grow={grow} at either end is more than the model's {blocks} blocks; lower it")
    start, end = (max(0, grow - overlap), min(blocks, blocks - grow + overlap)) if grow else (0, blocks)
    found = [range(k + 1) for k in range(grow)]
    while start < end:
        stop = min(start + window, end)
        found.append(range(start, stop))
        if stop == end:
            break
        start += window - overlap
    return found + [range(blocks - k, blocks) for k in range(grow, 0, -1)]


def finals(windows: Sequence[range], blocks: int) -> list[range]:
    """The blocks that are final after each window: no later one has them."""
    starts = [*(window.start for window in windows), blocks]
    return [range(start, stop) for start, stop in pairwise(starts)]


@dataclass(frozen=True)
class WindowStep(Step):
    """Several blocks in a row as one: a weight's name begins with the place of its block in the window."""

    parts: tuple[Step, ...] = ()

    @classmethod
    def of(cls, parts: tuple[Step, ...], *, targets: int, inputs: int) -> WindowStep:
        """The streams that are its targets and inputs become the first two."""
        first = parts[0]
        streams = (targets, inputs)
        named = tuple(
            replace(matrix, name=f"{place}.{matrix.name}")
            for place, part in enumerate(parts)
            for matrix in part.matrices
        )
        return cls(
            first.index,
            tuple(first.states[stream] for stream in streams),
            first.tokens_NT,
            named,
            first.replay,
            first.batch_size,
            first.autocast,
            tuple(first.carried[stream] for stream in streams),
            parts=tuple(
                replace(
                    part, states=tuple(part.states[s] for s in streams), carried=tuple(part.carried[s] for s in streams)
                )
                for part in parts
            ),
        )

    def run(
        self,
        block: nn.Module,
        rows: Rows,
        *,
        weights: dict[str, Tensor] | None = None,
        stream: int = 0,
        hidden_BTH: Tensor | None = None,
    ) -> Tensor:
        """The last block's output, of a ModuleList of the window's blocks."""
        assert isinstance(block, nn.ModuleList)
        own: list[dict[str, Tensor] | None] = [None if weights is None else {} for _ in self.parts]
        for name, weight in (weights or {}).items():
            place, _, rest = name.partition(".")
            of_block = own[int(place)]
            assert of_block is not None
            of_block[rest] = weight
        for part, each, of_block in zip(self.parts, block, own, strict=True):
            hidden_BTH = part.run(each, rows, weights=of_block, stream=stream, hidden_BTH=hidden_BTH).float()
        assert hidden_BTH is not None
        return hidden_BTH


@dataclass(frozen=True)
class Pending:
    """What windows have made of blocks that are not final, beside the finished ones: a later window goes on from it."""

    store: BlockStore

    def of(self, window: int) -> BlockStore:
        return replace(self.store, folder=self.store.folder / f"window-{window:04d}", latents=True)

    def whole(self, window: int, span: range) -> bool:
        return all(self.of(window).path(index).is_file() for index in span)

"""How many bits each weight gets: what a block's output loses by each width, and the choice that loses least.

After SliM-LLM (arXiv 2405.14917), a linear at a time where it has groups of columns: engines take one width a linear.
Its measure, the divergence of a softmax over a linear's own outputs, depends on their scale; here it is the relative
error of the block's output (BlockTask.loss), which the learned methods lower. Linears that read the same tensor share a
width, because engines fuse them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from math import gcd, inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upq.blockwise._base import ORIGINAL, QUANTISED, BlockTask
from upq.core.bounded import read_bytes
from upq.core.errors import UPQError
from upq.core.processes import Processes
from upq.core.progress import Progress
from upq.core.scheme import QuantScheme
from upq.files.atomic import atomic_write
from upq.grids import GRIDS, search_scale
from upq.model.activations import Allocate, allocator
from upq.model.source import Source
from upq.model.walker import walk as run_blocks

_BYTES = 1 << 28  # of a measurement's file, at most
_PRINTED = 5e-6  # half a unit of the last digit that the error for a mean prints
_UNITS = 1 << 22  # of a budget: the choice is exact, over a table of so many columns


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Of weights of one block that share a width."""

    block: int
    names: tuple[str, ...]
    weights: int
    errors: dict[int, float]  # by bits: the relative error of the block's output, all else in full precision


def measure(
    source: Source,
    calibration_NT: Tensor,
    scheme: QuantScheme,
    choices: Sequence[int],
    *,
    folder: Path,
    progress: Progress,
    bf16: bool,
    activations: AbstractContextManager[Allocate] | None = None,
    processes: Processes,
) -> list[Sensitivity]:
    """Round one group of weights of one block at a time, to each of `choices` bits. A block is a file in `folder`.

    Blocks whose file is there are not measured again. Several processes share the rows, and the first one writes.
    """
    found = list[Sensitivity]()
    with activations or allocator(None) as allocate:
        share_NT = processes.share(calibration_NT)
        for step in run_blocks(source, share_NT, streams=2, allocate=allocate, bf16=bf16):
            path, block = folder / f"block-{step.index:04d}.json", source.block(step.index)
            step.advance(block, stream=ORIGINAL)
            if processes.of_first(path.is_file()):
                measured = list(_read(json.loads(path.read_text())))
            else:
                measured = list(_of_block(BlockTask(step, block, 0, processes), scheme, choices))
                with processes.shared_errors():
                    if processes.first:
                        atomic_write(path, json.dumps([asdict(each) for each in measured]))
                progress.advance(1)
            found += measured
            step.advance(block, stream=QUANTISED)  # which stays the original's: a block's error is its own
    return found


@torch.no_grad()
def _of_block(task: BlockTask, scheme: QuantScheme, choices: Sequence[int]) -> Iterator[Sensitivity]:
    grid, weights = GRIDS.get(scheme.grid), task.weights()
    for names in task.groups():
        errors = {}
        for bits in choices:
            own = replace(scheme, bits=bits)
            rounded = {name: grid.fake(weights[name], search_scale(weights[name], own), own) for name in names}
            errors[bits] = task.error(rounded, relative=True)
        yield Sensitivity(task.index, names, sum(weights[name].numel() for name in names), errors)


def save(path: Path, key: str, measured: Sequence[Sensitivity]) -> None:
    atomic_write(path, json.dumps({"key": key, "measured": [asdict(each) for each in measured]}, indent=1))


def load(path: Path, key: str) -> list[Sensitivity]:
    """What `save` wrote. Raises UPQError where it was measured on something else, or is no such file."""
    try:
        raw = json.loads(read_bytes(path, _BYTES, remedy="is it a measurement of widths?"))
        written, measured = raw["key"], list(_read(raw["measured"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UPQError(f"{path}: no measurement of widths; give another file, or delete it") from None
    if written != key:
        raise UPQError(f"{path}: measured on another model, text, grid or choice of widths; give another file")
    return measured


def _read(raw: list[dict[str, Any]]) -> Iterator[Sensitivity]:
    for each in raw:
        errors = {int(bits): float(error) for bits, error in each["errors"].items()}
        yield Sensitivity(int(each["block"]), tuple(each["names"]), int(each["weights"]), errors)


def allocate(measured: Sequence[Sensitivity], mean: float) -> list[int]:
    """Bits of each, of mean exactly `mean` over all weights and least sum of errors (a knapsack, solved exactly).

    A mean that is no short decimal is met where its first six digits are `mean`'s.
    Raises UPQError where no choice has that mean.
    """
    choices = sorted(measured[0].errors)
    total, unit = sum(each.weights for each in measured), gcd(*(each.weights for each in measured))
    units = total // unit * (choices[-1] - choices[0])
    if units > _UNITS:
        raise UPQError(f"widths: shapes of these weights have too few common factors ({units:,} steps); set one width")
    wanted = (mean - choices[0]) * total / unit
    budget = round(wanted)
    met = abs(budget - wanted) * unit / total < _PRINTED and 0 <= budget <= units
    least = np.full(units + 1, inf)
    least[0] = 0.0
    taken = np.zeros((len(measured), units + 1), dtype=np.uint8)
    for row, each in enumerate(measured):
        after = np.full(units + 1, inf)
        for at, bits in enumerate(choices):
            more = each.weights // unit * (bits - choices[0])
            candidate = least[: units + 1 - more] + each.errors[bits]
            better = candidate < after[more:]
            after[more:][better] = candidate[better]
            taken[row, more:][better] = at
        least = after
    if not met or not np.isfinite(least[budget]):
        reachable = np.flatnonzero(np.isfinite(least))
        near = reachable[np.abs(reachable - wanted).argsort(kind="stable")[:2]]
        means = " or ".join(f"{choices[0] + int(each) * unit / total:.6g}" for each in sorted(near))
        raise UPQError(
            f"widths: a mean of exactly {mean:g} cannot be met with {', '.join(map(str, choices))} bits and these"
            f" weights; the nearest: {means}"
        )
    left, found = budget, list[int]()
    for row in range(len(measured) - 1, -1, -1):
        bits = choices[taken[row, left]]
        found.append(bits)
        left -= measured[row].weights // unit * (bits - choices[0])
    return found[::-1]

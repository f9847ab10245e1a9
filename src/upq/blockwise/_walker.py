"""Walks the decoder blocks in order: solve one, write it, and go on with what it makes of the hidden states."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upq.blockwise._base import ORIGINAL, QUANTISED, BlockTask, Method
from upq.blockwise._finite import watched
from upq.blockwise._sinks import sinks
from upq.blockwise._store import BlockStore, Report
from upq.core.errors import UPQError
from upq.core.memory import trim
from upq.core.precision import Precision, computes_in_bf16
from upq.core.processes import ALONE, Processes
from upq.core.progress import Progress
from upq.files.metrics import NOWHERE, Metrics
from upq.grids import SMALLEST_SCALE
from upq.model.activations import Allocate, allocator
from upq.model.matrices import Matrix
from upq.model.source import Source
from upq.model.walker import Step
from upq.model.walker import walk as run_blocks


def walk(
    source: Source,
    calibration_NT: Tensor,
    method: Method,
    store: BlockStore,
    *,
    given: BlockStore | None,
    seed: int,
    progress: Progress,
    precision: Precision = "fp32",
    activations: AbstractContextManager[Allocate] | None = None,
    processes: Processes = ALONE,
    metrics: Metrics = NOWHERE,
) -> None:
    """Solve every block of `source` that `store` does not hold yet.

    Two streams of hidden states go through the blocks: the original's, which gives the targets, and that of the
    quantised prefix, which each block will really read. `given` has the weights that become codes (the INT4 stage's,
    for the INT2 stage); None takes the original's. Blocks already on disk are run, not solved, so an interrupted walk
    ends in the same bytes. One block is in memory at a time; the streams are in memory too, or where `activations` puts
    them.

    Several `processes` walk together, each with its share of the calibration rows: the solutions are those of a single
    one but for the rounding of sums over rows. The first one writes, and all others go on with what it wrote.
    Each block that is solved has a line of `metrics`.

    Raises UPQError, in all processes, where a block writes NaN or infinity: it names block and linear, and such a block
    is not stored.
    """
    done = processes.of_first(store.done(len(source)))
    with processes.shared_errors():
        metrics.begin("block", done)
    streams = 2 if method.needs_inputs and done < len(source) else 0
    bf16 = computes_in_bf16(precision, source.device, source.text.hidden_size)
    with activations or allocator(None) as allocate:
        with processes.shared_errors():
            share_NT = processes.share(calibration_NT)
            steps = run_blocks(source, share_NT, streams=streams, allocate=allocate, bf16=bf16)
        stage = _Stage(source, method, store, given, seed, progress, processes, metrics)
        for step in steps:
            if streams or step.index >= done:
                stage.block(step, solved=step.index < done)


@dataclass(frozen=True)
class _Stage:
    """What stays the same from block to block."""

    source: Source
    method: Method
    store: BlockStore
    given: BlockStore | None
    seed: int
    progress: Progress
    processes: Processes
    metrics: Metrics

    def block(self, step: Step, *, solved: bool) -> None:
        """Solve one block, or take it `solved` from the store, and go through it. Nothing of the block stays."""
        source, store, processes, index = self.source, self.store, self.processes, step.index
        at = f"{store.folder.name}: block {index}"
        trim()  # after a block of a 1B is rounded, 400 MB stay in the heap
        with processes.shared_errors():
            block = source.block(index)
            trim()  # and after one is read, 200
            if step.states:
                with watched(block, step.matrices, f"{at}, of the original model", "is it whole?"):
                    step.advance(block, stream=ORIGINAL)
        if self.given is not None:
            _put(block, step.matrices, self.given, index, processes)
        if not solved:
            task = BlockTask(step, block, self.seed * 1_000_003 + index, processes)
            report, massive = _solve(task, self.method, store, source, at, self.metrics)
            self._note_unreached(index, report)
            self._note_massive(index, massive)
            self.progress.advance(1, **_error_of(report))
        if step.states:
            _put(block, step.matrices, store, index, processes)
            remedy = f"delete {store.path(index)}"
            with processes.shared_errors(), watched(block, step.matrices, f"{at}, stored", remedy):
                step.advance(block, stream=QUANTISED)

    def _note_unreached(self, index: int, report: Report) -> None:
        for name, figures in report.items():
            if experts := figures.get("unreached"):
                named = ", ".join(map(str, experts))
                self.progress.note(
                    f"block {index}, {name}: no calibration token reached expert{'s' * (len(experts) > 1)} {named}; "
                    "their scales come from the weights alone"
                )

    def _note_massive(self, index: int, massive: dict[str, Any] | None) -> None:
        """Where a block makes them."""
        if massive is None or not massive.get("weights"):
            return
        made = ", ".join(f"{w['name']}[{w['row']}, {w['column']}]" for w in massive["weights"])
        self.progress.note(
            f"block {index}: {massive['tokens']} of {massive['of']} tokens get massive states, made by {made}; "
            f"their error is {massive['error']:.2f}"
        )


def _solve(
    task: BlockTask, method: Method, store: BlockStore, source: Source, at: str, metrics: Metrics
) -> tuple[Report, dict[str, Any] | None]:
    """Solve one block and write it. What that took is free again on return, before the next block is read.

    The report has for each weight the relative error of its weight against the original's and, where it is known, of
    the block's output: of all tokens but those with massive states, which are spoken of apart (`sinks`).
    """
    began = time.monotonic()
    massive = sinks(task) if task.step.states else None
    solutions = method.solve(task, store.scheme)
    remedy = f"choose another {store.folder.name}.method, with another --out"
    weights = {name: s.qtensor().dequantize() for name, s in solutions.items()}
    squares = torch.zeros(2, 2, dtype=torch.float64)
    with task.processes.shared_errors():
        # The original is read once more: kept, it would be a copy of the block for as long as the block is solved.
        report: Report = {
            name: {"weight": _relative(w_OI, source.weight(task.index, task.matrices[name]))}
            for name, w_OI in weights.items()
        }
        if task.step.states:
            with watched(task.block, task.step.matrices, f"{at}, quantised", remedy):
                squares = task.squares_here(weights)
        for name, found in report.items():
            if not math.isfinite(found["weight"]):
                raise UPQError(f"{at}, quantised: {name} holds NaN or infinity; {remedy}")
    if task.step.states:
        for name, experts in task.unreached().items():
            report[name]["unreached"] = list(experts)
        totals = [[task.processes.total(each) for each in kind] for kind in squares.tolist()]
        of_zeros = torch.finfo(torch.float32).tiny  # hidden states that are all zero
        of_massive, of_others = ((error / max(size, of_zeros)) ** 0.5 for error, size in totals)
        for found in report.values():
            found["block"] = of_others
        if massive is not None:
            massive["error"] = of_massive
    with task.processes.shared_errors():
        if task.processes.first:
            figures = {**_error_of(report), **task.figures, "seconds": round(time.monotonic() - began, 3)}
            metrics.append("block", task.index, durable=True, **figures)
            store.save(task.index, solutions, report, massive)
    return report, massive


def _error_of(report: Report) -> dict[str, float]:
    """Of the block's output, where it is known: methods without inputs do not run the block."""
    errors = [found["block"] for found in report.values() if "block" in found]
    return {"error": errors[0]} if errors else {}


def _relative(approximation: Tensor, exact: Tensor) -> float:
    # Of a weight of zeros: in units of the smallest scale, which is what a grid without a zero level makes of it.
    least = SMALLEST_SCALE * math.sqrt(exact.numel())
    return float((approximation - exact).norm() / exact.norm().clamp_min(least))


@torch.no_grad()
def _put(block: nn.Module, matrices: tuple[Matrix, ...], store: BlockStore, index: int, processes: Processes) -> None:
    """The weights of a stored block, as the first process reads them: they are the same bits in all."""
    with processes.shared_errors():
        if processes.first:
            weights = store.weights(index)
            for matrix in matrices:
                matrix.write(block, weights[matrix.name])
    processes.copy(*(block.get_parameter(matrix.parameter) for matrix in matrices))

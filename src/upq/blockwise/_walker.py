"""Walks the decoder blocks in order: solve one, write it, and go on with what it makes of the hidden states."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from upq.blockwise._base import ORIGINAL, QUANTISED, BlockTask, Method
from upq.blockwise._finite import watched
from upq.blockwise._sinks import sinks
from upq.blockwise._store import BlockStore, Report
from upq.blockwise._windows import Order, Pending, WindowStep, finals, spans
from upq.core.errors import UPQError
from upq.core.memory import trim
from upq.core.outliers import truncated
from upq.core.precision import Precision, computes_in_bf16
from upq.core.processes import ALONE, Processes
from upq.core.progress import Progress
from upq.files.metrics import NOWHERE, Metrics
from upq.grids import SMALLEST_SCALE, Params
from upq.model.activations import Allocate, allocator, batches
from upq.model.matrices import Matrix
from upq.model.source import Source
from upq.model.walker import Step
from upq.model.walker import walk as run_blocks
from upq.nn.activations import attach_inputs, static_scales
from upq.nn.fake_quant import Solution
from upq.nn.fixed_codes import Start
from upq.nn.kv import attach_kv

_AHEAD = 2  # a third stream: the original's, at the end of a window


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
    order: Order = Order(),  # noqa: B008  (frozen)
    truncate: bool = False,
) -> None:
    """Solve every block of `source` that `store` does not hold yet.

    Two streams of hidden states go through the blocks: the original's, which gives the targets, and that of the
    quantised prefix, which each block will really read. `given` has the weights that become codes (the INT4 stage's,
    for the INT2 stage); None takes the original's. Blocks already on disk are run, not solved, so an interrupted walk
    ends in the same bytes. One block is in memory at a time; the streams are in memory too, or where `activations` puts
    them.

    Several `processes` walk together, each with its share of the calibration rows: the solutions are those of a single
    one but for the rounding of sums over rows. The first one writes, and all others go on with what it wrote. With
    `order.apart` each solves blocks of its own over all rows instead, and writes them: the bytes are those of one.

    Each block that is solved has a line of `metrics`; with `order.apart` those of the first process.

    `truncate` cuts outliers of the weights off before a block is solved (upq.core.outliers).

    Raises UPQError, in all processes, where a block writes NaN or infinity: it names block and linear, and such a block
    is not stored.
    """
    done = processes.of_first(store.done(len(source)))
    with processes.shared_errors():
        metrics.begin("block", done)
    missing = done < len(source)
    static = store.activations is not None and store.activations.static
    streams = (2 if order.plain else 3) if (method.needs_inputs or static) and missing else 0
    bf16 = computes_in_bf16(precision, source.device, source.text.hidden_size)
    with activations or allocator(None) as allocate:
        with processes.shared_errors():
            share_NT = calibration_NT if order.apart else processes.share(calibration_NT)
            steps = run_blocks(source, share_NT, streams=streams, allocate=allocate, bf16=bf16)
        if order.apart:
            with processes.shared_errors():
                stage = _Stage(
                    source,
                    method,
                    store,
                    given,
                    seed,
                    progress,
                    ALONE,
                    truncate,
                    metrics if processes.first else NOWHERE,
                )
                for step in steps:
                    mine = step.index % processes.world == processes.rank
                    stage.block(step, solved=not mine or store.path(step.index).is_file(), apart=True)
            with processes.shared_errors():
                if store.done(len(source)) < len(source):
                    raise UPQError(f"{store.folder}: blocks of other processes are not there; all machines must see it")
            return
        stage = _Stage(source, method, store, given, seed, progress, processes, truncate, metrics)
        if not order.plain and missing:
            stage.windows(list(steps), order)
            return
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
    truncate: bool
    metrics: Metrics
    input_scales: dict[int, dict[str, float]] = field(default_factory=dict)  # by block, of static activations

    def block(self, step: Step, *, solved: bool, apart: bool = False) -> None:
        """Solve one block, or take it `solved` from the store, and go through it. Nothing of the block stays.

        `apart`: the next block will read what the original's writes.
        """
        at = self._at(step)
        trim()  # after a block of a 1B is rounded, 400 MB stay in the heap
        with self.processes.shared_errors():
            block = self.source.block(step.index)
            trim()  # and after one is read, 200
            if step.states:
                with self._original(step, block):
                    step.advance(block, stream=ORIGINAL)
        self._round(step, block, solved=solved)
        if not solved:
            self._begin(step, block)
            task = BlockTask(step, block, self._seed(step.index), self.processes, self.store.widths_of(step.index))
            began = time.monotonic()
            massive = sinks(task) if step.states else None
            solutions = self.method.solve(task, self.store.scheme)
            self._finish(task, solutions, massive, began)
            del task, solutions
        if step.states and apart:
            block = self.source.block(step.index)
            step.advance(block, stream=QUANTISED)
        elif step.states:
            self._go_on(step, block, at)

    def windows(self, steps: list[Step], order: Order) -> None:
        """Solve windows of blocks. What is learned of a block that a later window has too, it goes on from.

        The original's stream that gives the targets runs ahead of the two others, to the end of the window.
        """
        found, pending = spans(len(self.source), order), Pending(self.store)
        parts = finals(found, len(self.source))
        carries = [span.stop > part.stop for span, part in zip(found, parts, strict=True)]
        at_end = [n for n, span in enumerate(found) if self._solved(n, span, parts[n], carries[n], pending)]
        done, ahead = self.processes.of_first(max(at_end, default=-1)), 0
        for n, (span, part) in enumerate(zip(found, parts, strict=True)):
            for index in range(ahead, span.stop):
                with self.processes.shared_errors():
                    block = self.source.block(index)
                    with self._original(steps[index], block):
                        steps[index].advance(block, stream=_AHEAD)
            ahead = span.stop
            solutions: dict[int, dict[str, Start]] = {}
            began, figures = time.monotonic(), dict[str, float]()
            if n > done:
                before = pending.of(n - 1) if n and carries[n - 1] else None
                joined = [steps[i] for i in span]
                solutions = self._window(n, joined, order, before, found[n - 1] if n else span, figures)
                if carries[n]:
                    with self.processes.shared_errors():
                        if self.processes.first:
                            for index in span:
                                pending.of(n).save(index, solutions[index], {})
            for index in part:
                waiting = pending.of(n) if carries[n] else None
                self._final(steps[index], solutions.get(index), waiting, began, figures)
            with self.processes.shared_errors():
                if self.processes.first and n and carries[n - 1]:
                    shutil.rmtree(pending.of(n - 1).folder, ignore_errors=True)

    def _solved(self, n: int, span: range, part: range, carries: bool, pending: Pending) -> bool:
        """Whether all that window `n` leaves is on disk."""
        return pending.whole(n, span) if carries else all(self.store.path(index).is_file() for index in part)

    def _window(
        self,
        n: int,
        steps: list[Step],
        order: Order,
        before: BlockStore | None,
        span_before: range,
        figures: dict[str, float],
    ) -> dict[int, dict[str, Start]]:
        blocks, warm, widths = nn.ModuleList(), dict[str, Params](), dict[str, int]()
        for place, step in enumerate(steps):
            with self.processes.shared_errors():
                blocks.append(self.source.block(step.index))
            if before is not None and step.index in span_before:
                with self.processes.shared_errors():  # all read what the first has written
                    for name, solution in before.solutions(step.index).items():
                        matrix = next(each for each in step.matrices if each.name == name)
                        assert isinstance(solution, Solution)
                        matrix.write(blocks[place], solution.latent_OI)
                        warm[f"{place}.{name}"] = {
                            key: value.to(self.source.device) for key, value in solution.params.items()
                        }
            else:
                self._begin(step, blocks[place])
            self._round(step, blocks[place])
            widths |= {f"{place}.{name}": bits for name, bits in self.store.widths_of(step.index).items()}
        joined = WindowStep.of(tuple(steps), targets=_AHEAD, inputs=QUANTISED)
        task = BlockTask(
            joined,
            blocks,
            self._seed(n),
            self.processes,
            widths,
            warm,
            originals_NTH=steps[0].states[ORIGINAL],
            annealing=order.annealing,
            figures=figures,
        )
        found: dict[int, dict[str, Start]] = {step.index: {} for step in steps}
        for name, solution in self.method.solve(task, self.store.scheme).items():
            at, _, rest = name.partition(".")
            found[steps[int(at)].index][rest] = solution
        return found

    def _final(
        self,
        step: Step,
        solutions: Mapping[str, Start] | None,
        pending: BlockStore | None,
        began: float,
        figures: dict[str, float],
    ) -> None:
        """Write a block that no later window has, unless it is there, and let the streams go through it."""
        with self.processes.shared_errors():
            block = self.source.block(step.index)
            with self._original(step, block):
                step.advance(block, stream=ORIGINAL)
        self._round(step, block)
        if not self.processes.of_first(self.store.path(step.index).is_file()):
            if self.given is not None:
                _put(block, step.matrices, self.given, step.index, self.processes)
            if solutions is None:
                assert pending is not None
                with self.processes.shared_errors():
                    solutions = pending.solutions(step.index)
            widths = self.store.widths_of(step.index)
            task = BlockTask(step, block, self._seed(step.index), self.processes, widths, figures=figures)
            self._finish(task, solutions, sinks(task), began)
        self._go_on(step, block, self._at(step))
        step.forget()

    def _round(self, step: Step, block: nn.Module, *, solved: bool = False) -> None:
        """From here on the block reads what the artefact's will: rounded inputs, keys and values."""
        attach_kv(block, self.store.kv)
        scheme, scales = self.store.activations, dict[str, float]()
        if scheme is None:
            return
        names = [matrix.name for matrix in step.matrices]
        if scheme.static and solved:
            with self.processes.shared_errors():
                known = json.dumps(self.store.input_scales(step.index)) if self.processes.first else ""
            scales = json.loads(self.processes.text_of_first(known))
        elif scheme.static:
            here = static_scales(block, names, scheme, lambda: _over_rows(step, block))
            every = torch.zeros(self.processes.world, len(names), dtype=torch.float64)
            every[self.processes.rank] = torch.tensor([here[name] for name in names], dtype=torch.float64)
            self.processes.sum(every)
            scales = dict(zip(names, every.amax(0).tolist(), strict=True))
        self.input_scales[step.index] = scales
        attach_inputs(block, names, scheme, scales)

    def _begin(self, step: Step, block: nn.Module) -> None:
        """What is to be solved: the weights of the stage before, or the original's."""
        if self.given is not None:
            _put(block, step.matrices, self.given, step.index, self.processes)
        if self.truncate:
            for matrix in step.matrices:
                matrix.write(block, truncated(matrix.read(block)))

    def _finish(
        self, task: BlockTask, solutions: Mapping[str, Start], massive: dict[str, Any] | None, began: float
    ) -> None:
        index = task.index
        report = _measure(task, solutions, massive, self.store, self.source, self._at(task.step))
        for name, scale in self.input_scales.get(index, {}).items():
            report[name]["input_scale"] = scale
        with task.processes.shared_errors():
            if task.processes.first:
                figures = {**_error_of(report), **task.figures, "seconds": round(time.monotonic() - began, 3)}
                self.metrics.append("block", index, durable=True, **figures)
                self.store.save(index, solutions, report, massive)
        self._note_unreached(index, report)
        self._note_massive(index, massive)
        self.progress.advance(1, **_error_of(report))

    def _go_on(self, step: Step, block: nn.Module, at: str) -> None:
        """The quantised stream, through what is stored."""
        _put(block, step.matrices, self.store, step.index, self.processes)
        remedy = f"delete {self.store.path(step.index)}"
        with self.processes.shared_errors(), watched(block, step.matrices, f"{at}, stored", remedy):
            step.advance(block, stream=QUANTISED)

    def _seed(self, index: int) -> int:
        return self.seed * 1_000_003 + index

    def _at(self, step: Step) -> str:
        return f"{self.store.folder.name}: block {step.index}"

    def _original(self, step: Step, block: nn.Module) -> AbstractContextManager[None]:
        return watched(block, step.matrices, f"{self._at(step)}, of the original model", "is it whole?")

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


@torch.no_grad()
def _over_rows(step: Step, block: nn.Module) -> None:
    for rows in batches(len(step.states[QUANTISED]), step.batch_size):
        step.run(block, rows, stream=QUANTISED)


def _measure(
    task: BlockTask,
    solutions: Mapping[str, Start],
    massive: dict[str, Any] | None,
    store: BlockStore,
    source: Source,
    at: str,
) -> Report:
    """The report of a solved block. `massive` gets the error of its tokens.

    It has for each weight the relative error of its weight against the original's and, where it is known, of
    the block's output: of all tokens but those with massive states, which are spoken of apart (`sinks`).
    """
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
    return report


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

"""Walks the decoder blocks in order: solve one, write it, and go on with what it makes of the hidden states."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from upq.blockwise._base import BlockTask, Method, linear
from upq.blockwise._finite import watched
from upq.blockwise._store import BlockStore, Report
from upq.core.errors import UPQError
from upq.core.memory import trim
from upq.core.processes import ALONE, Processes
from upq.core.progress import Progress
from upq.model.activations import Activations, Allocate, allocator, stretches
from upq.model.streaming import Context, StreamedModel, run_block


def walk(
    model: StreamedModel,
    calibration_NT: Tensor,
    method: Method,
    store: BlockStore,
    *,
    source: BlockStore | None,
    seed: int,
    progress: Progress,
    activations: AbstractContextManager[Allocate] | None = None,
    processes: Processes = ALONE,
) -> None:
    """Solve every block of `model` that `store` does not hold yet.

    Two streams of hidden states pass through the blocks: the original's, which gives the targets, and that of the
    quantised prefix, which each block will really read. `source` gives the weights that become codes (the INT4
    stage's, for the INT2 stage); None takes the original's. Blocks already on disk are run, not solved, so an
    interrupted walk ends in the same bytes. One block is in memory at a time; the streams are in memory too, or where
    `activations` puts them.

    Several `processes` walk together, each with its share of the calibration rows: the solutions are those of a single
    one but for the rounding of sums over rows. The first one writes, and what it wrote is what all go on with.

    Raises UPQError, in all processes, where a block writes NaN or infinity: it names block and linear, and such a block
    is not stored.
    """
    done = processes.of_first(store.done(len(model)))
    with activations or allocator(None) as allocate:
        streams: _Streams | None = None
        if method.needs_inputs and done < len(model):
            with processes.shared_errors():
                streams = _Streams.begin(model, calibration_NT, allocate, processes)
        walked = _Walk(model, method, store, source, streams, seed, progress, processes)
        for index in range(done if streams is None else 0, len(model)):
            walked.block(index, solved=index < done)


@dataclass(frozen=True)
class _Walk:
    """What stays the same from block to block."""

    model: StreamedModel
    method: Method
    store: BlockStore
    source: BlockStore | None
    streams: _Streams | None
    seed: int
    progress: Progress
    processes: Processes

    def block(self, index: int, *, solved: bool) -> None:
        """Solve one block, or take it `solved` from the store, and go through it. Of the block nothing stays."""
        model, store, streams, processes = self.model, self.store, self.streams, self.processes
        linears, at = model.spec.linears, f"{store.folder.name}: block {index}"
        context = {} if streams is None else streams.contexts[index]
        trim()  # of a block of a 1B that is rounded, 400 MB stay in the heap
        with processes.shared_errors():
            block = model.block(index)
            trim()  # and of one that is read 200
            if streams is not None:
                with model.autocast(), watched(block, linears, f"{at}, of the original model", "is it whole?"):
                    run_block(block, streams.original_NTH, context)
        if self.source is not None:
            _put(block, linears, self.source, index, processes)
        if not solved:
            seeded = self.seed * 1_000_003 + index
            task = BlockTask(
                index, block, model.spec, context, seed=seeded, processes=processes, autocast=model.autocast
            )
            if streams is not None:
                task = replace(task, inputs_NTH=streams.quantised_NTH, targets_NTH=streams.original_NTH)
            report = _solve(task, self.method, store, model, at)
            figures = {} if streams is None else {"error": report[linears[0]]["block"]}
            self.progress.advance(1, **figures)
        if streams is not None:
            _put(block, linears, store, index, processes)
            remedy = f"delete {store.path(index)}"
            with processes.shared_errors(), model.autocast(), watched(block, linears, f"{at}, stored", remedy):
                run_block(block, streams.quantised_NTH, context)


@dataclass(frozen=True)
class _Streams:
    """The hidden states before a block, of this process's share of the calibration rows.

    Each block's outputs take the place of its inputs: no other copy is kept.
    """

    original_NTH: Activations
    quantised_NTH: Activations
    contexts: list[Context]

    @classmethod
    def begin(cls, model: StreamedModel, calibration_NT: Tensor, allocate: Allocate, processes: Processes) -> _Streams:
        share_NT = processes.share(calibration_NT)
        if len(share_NT):
            original_NTH, contexts = model.embed(share_NT, allocate=allocate)
        else:  # more processes than rows: this one still takes part in the sums
            row_NTH, contexts = model.embed(calibration_NT[:1])
            original_NTH = allocate(torch.Size((0, *row_NTH.shape[1:])), model.device)
        quantised_NTH = allocate(original_NTH.shape, model.device)
        for rows in stretches(len(original_NTH), 1):
            quantised_NTH[rows] = original_NTH[rows]
        return cls(original_NTH, quantised_NTH, contexts)


def _solve(task: BlockTask, method: Method, store: BlockStore, model: StreamedModel, at: str) -> Report:
    """Solve one block and write it. What that took is free again on return, before the next block is read.

    The report has for each linear the relative error of its weight against the original's and, where it is known, of
    the block's output.
    """
    solutions = method.solve(task, store.scheme)
    remedy = f"choose another {store.folder.name}.method, with another --out"
    weights = {name: s.qtensor().dequantize() for name, s in solutions.items()}
    with task.processes.shared_errors():
        # The original is read once more: kept, it would be a copy of the block for as long as the block is solved.
        report = {name: {"weight": _relative(w_OI, model.weight(task.index, name))} for name, w_OI in weights.items()}
        error = size = 0.0
        if task.targets_NTH is not None:
            with watched(task.block, task.spec.linears, f"{at}, quantised", remedy):
                error, size = task.error_here(weights), _squares(task.targets_NTH)
        for name, found in report.items():
            if not math.isfinite(found["weight"]):
                raise UPQError(f"{at}, quantised: {name} holds NaN or infinity; {remedy}")
    if task.targets_NTH is not None:
        block = (task.processes.total(error) / task.processes.total(size)) ** 0.5
        for found in report.values():
            found["block"] = block
    with task.processes.shared_errors():
        if task.processes.first:
            store.save(task.index, solutions, report)
    return report


def _relative(approximation: Tensor, exact: Tensor) -> float:
    return float((approximation - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _squares(hidden_NTH: Activations, batch_size: int = 8) -> float:
    """The sum of the rows' mean squares."""
    batches = (hidden_NTH[rows] for rows in stretches(len(hidden_NTH), batch_size))
    return float(sum(batch.square().mean().item() * len(batch) for batch in batches))


@torch.no_grad()
def _put(block: nn.Module, linears: tuple[str, ...], store: BlockStore, index: int, processes: Processes) -> None:
    """The weights of a stored block, as the first process reads them: they are the same bits in all."""
    with processes.shared_errors():
        if processes.first:
            for name, weight in store.weights(index).items():
                linear(block, name).weight.copy_(weight)
    processes.copy(*(linear(block, name).weight for name in linears))

"""Walks the decoder blocks in order: solve one, write it, and go on with what it makes of the hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from upq.activations import Activations, Allocate, allocator, stretches
from upq.blockwise._base import BlockTask, Method, linear
from upq.blockwise._finite import watched
from upq.blockwise._store import BlockStore, Report
from upq.errors import UPQError
from upq.nn.fake_quant import Solution
from upq.progress import Progress
from upq.streaming import Context, StreamedModel, run_block


def walk(
    model: StreamedModel,
    calibration_NT: Tensor,
    method: Method,
    store: BlockStore,
    *,
    source: BlockStore | None,
    seed: int,
    progress: Progress,
    activations: Path | None = None,
) -> None:
    """Solve every block of `model` that `store` does not hold yet.

    Two streams of hidden states pass through the blocks: the original's, which gives the targets, and that of the
    quantised prefix, which each block will really read. `source` gives the weights that become codes (the INT4
    stage's, for the INT2 stage); None takes the original's. Blocks already on disk are run, not solved, so an
    interrupted walk ends in the same bytes. One block is in memory at a time; the streams are in memory too, or in
    files below `activations`, where that is given.

    Raises UPQError where a block writes NaN or infinity: it names block and linear, and such a block is not stored.
    """
    done, linears = store.done(len(model)), model.spec.linears
    with allocator(activations) as allocate:
        streams: _Streams | None = None
        if method.needs_inputs and done < len(model):
            streams = _Streams.begin(model, calibration_NT, allocate)
        for index in range(len(model)):
            if streams is None and index < done:
                continue
            block, at = model.block(index), f"{store.folder.name}: block {index}"
            context = {} if streams is None else streams.contexts[index]
            if streams is not None:
                with watched(block, linears, f"{at}, of the original model", "is it whole?"):
                    run_block(block, streams.original_NTH, context)
            if source is not None:
                _put(block, source.weights(index))
            if index >= done:
                task = BlockTask(index, block, model.spec, context, seed=seed * 1_000_003 + index)
                if streams is not None:
                    task = replace(task, inputs_NTH=streams.quantised_NTH, targets_NTH=streams.original_NTH)
                report = _solve(task, method, store, model, at)
                figures = {} if streams is None else {"error": report[linears[0]]["block"]}
                progress.advance(1, **figures)
            if streams is not None:
                _put(block, store.weights(index))
                with watched(block, linears, f"{at}, stored", f"delete {store.path(index)}"):
                    run_block(block, streams.quantised_NTH, context)


@dataclass(frozen=True)
class _Streams:
    """The hidden states before a block. Each block's outputs take the place of its inputs: no other copy is kept."""

    original_NTH: Activations
    quantised_NTH: Activations
    contexts: list[Context]

    @classmethod
    def begin(cls, model: StreamedModel, calibration_NT: Tensor, allocate: Allocate) -> _Streams:
        original_NTH, contexts = model.embed(calibration_NT, allocate=allocate)
        quantised_NTH = allocate(original_NTH.shape, model.device)
        for rows in stretches(len(original_NTH), 1):
            quantised_NTH[rows] = original_NTH[rows]
        return cls(original_NTH, quantised_NTH, contexts)


def _solve(task: BlockTask, method: Method, store: BlockStore, model: StreamedModel, at: str) -> Report:
    """Solve one block and write it. What that took is free again on return, before the next block is read."""
    solutions = method.solve(task, store.scheme)
    remedy = f"choose another {store.folder.name}.method, with another --out"
    with watched(task.block, task.spec.linears, f"{at}, quantised", remedy):
        report = _report(task, solutions, model)
    for name, found in report.items():
        if not math.isfinite(found["weight"]):
            raise UPQError(f"{at}, quantised: {name} holds NaN or infinity; {remedy}")
    store.save(task.index, solutions, report)
    return report


def _report(task: BlockTask, solutions: dict[str, Solution], model: StreamedModel) -> Report:
    """Per linear: relative error of the weight against the original's, and of the block's output where it is known."""
    weights = {name: s.qtensor().dequantize() for name, s in solutions.items()}
    # The original is read once more: kept, it would be a copy of the block for as long as the block is being solved.
    report = {name: {"weight": _relative(w_OI, model.weight(task.index, name))} for name, w_OI in weights.items()}
    if task.targets_NTH is not None:
        block = (task.error(weights) / _mean_square(task.targets_NTH)) ** 0.5
        for figures in report.values():
            figures["block"] = block
    return report


def _relative(approximation: Tensor, exact: Tensor) -> float:
    return float((approximation - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _mean_square(hidden_NTH: Activations, batch_size: int = 8) -> float:
    batches = (hidden_NTH[rows] for rows in stretches(len(hidden_NTH), batch_size))
    return float(sum(batch.square().mean().item() * len(batch) for batch in batches) / len(hidden_NTH))


@torch.no_grad()
def _put(block: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        linear(block, name).weight.copy_(weight)

"""Walks the decoder blocks in order: solve one, write it, and go on with what it makes of the hidden states."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from upq.blockwise._base import BlockTask, Method, linear
from upq.blockwise._store import BlockStore
from upq.nn.fake_quant import Solution
from upq.progress import Progress
from upq.streaming import StreamedModel, run_block


def walk(
    model: StreamedModel,
    calibration_NT: Tensor,
    method: Method,
    store: BlockStore,
    *,
    source: BlockStore | None,
    seed: int,
    progress: Progress,
) -> None:
    """Solve every block of `model` that `store` does not hold yet.

    Two streams of hidden states pass through the blocks: the original's, which gives the targets, and that of the
    quantised prefix, which each block will really read. `source` gives the weights that become codes (the INT4
    stage's, for the INT2 stage); None takes the original's. Blocks already on disk are run, not solved, so an
    interrupted walk ends in the same bytes. One block is in memory at a time, in both forms.
    """
    streams: tuple[Tensor, Tensor] | None = None
    done = store.done(len(model))
    if method.needs_inputs and done < len(model):
        hidden_NTH, contexts = model.embed(calibration_NT)
        streams = (hidden_NTH, hidden_NTH)
    for index in range(len(model)):
        if streams is None and index < done:
            continue
        block = model.block(index)
        original = {name: linear(block, name).weight.detach().clone() for name in model.spec.linears}
        task = BlockTask(index, block, model.spec, context={}, seed=seed * 1_000_003 + index)
        if streams is not None:
            fp_inputs, inputs = streams
            targets = run_block(block, fp_inputs, contexts[index])
            task = replace(
                task, context=contexts[index], fp_inputs_NTH=fp_inputs, inputs_NTH=inputs, targets_NTH=targets
            )
        if source is not None:
            _put(block, source.weights(index))
        if index >= done:
            solutions = method.solve(task, store.scheme)
            report = _report(task, solutions, original)
            store.save(index, solutions, report)
            figures = {"error": report[model.spec.linears[0]]["block"]} if task.targets_NTH is not None else {}
            progress.advance(1, **figures)
        if streams is not None:
            _put(block, store.weights(index))
            assert task.targets_NTH is not None
            streams = (task.targets_NTH, run_block(block, streams[1], contexts[index]))


def _report(
    task: BlockTask, solutions: dict[str, Solution], original: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Per linear: relative error of the weight against the original's, and of the block's output where it is known."""
    weights = {name: s.qtensor().dequantize() for name, s in solutions.items()}
    report = {name: {"weight": _relative(w_OI, original[name])} for name, w_OI in weights.items()}
    if task.targets_NTH is not None:
        block = (task.error(weights) / task.targets_NTH.square().mean().item()) ** 0.5
        for figures in report.values():
            figures["block"] = block
    return report


def _relative(approximation: Tensor, exact: Tensor) -> float:
    return float((approximation - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny))


@torch.no_grad()
def _put(block: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        linear(block, name).weight.copy_(weight)

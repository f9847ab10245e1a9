"""Gradient descent on one block's output error: what the learned methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from upq.blockwise._base import BlockTask, Calibration, Work, pass_work, shuffled_batches
from upq.core.errors import UPQError
from upq.model.sizes import FP32, Bytes, Sizes, largest, tensors

Groups = list[dict[str, object]]  # optimiser groups: {"params": [...], "lr": ...}


def reconstruct(
    task: BlockTask,
    weights: Callable[[], dict[str, Tensor]],
    groups: Groups,
    *,
    relative: bool,
    iterations: int,
    batch_size: int,
    final_lr: float = 0.0,
    hard: Callable[[], dict[str, Tensor]] | None = None,
    penalty: Callable[[float], Tensor | None] | None = None,
    before_step: Callable[[float], None] | None = None,
) -> tuple[float, float]:
    """Adam with cosine decay to 0 on the squared error of the block's output, `relative` or not (BlockTask.loss).

    `weights` gives the differentiable quantised weights. Leaves the parameters at the better of start and end and
    returns the errors over all calibration rows before and after. Where several processes share these, a batch is still
    the one that a single process takes: its rows are computed where they lie, and the gradients added up.

    `final_lr`: where the cosine ends, as a share of each rate. `hard` gives the weights by which start and end are
    judged, where those that learn are not yet on the grid. `penalty` is added to the loss, and `before_step` called,
    with the share of the steps that are done.
    """
    learned: list[Tensor] = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    start = [p.detach().clone() for p in learned]
    judged = hard or weights
    with torch.no_grad():
        before = task.error(judged(), relative=relative)
    # Fused, a step on 34 million weights takes 0.02 s of one core, else 0.19.
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * i / iterations))
    )
    rows = task.rows()
    for step, index_B in enumerate(shuffled_batches(rows, min(batch_size, rows), iterations, task.seed)):
        done = step / iterations
        if before_step is not None:
            before_step(done)
        loss = task.batch_loss(weights, index_B, relative=relative, original=task.original_share(done))
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        # Of no rows, so it is one process's: the gradients are added up.
        if penalty is not None and task.processes.first and (extra := penalty(done)) is not None:
            extra.backward()  # type: ignore[no-untyped-call]
        task.processes.sum(*_gradients(learned))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # before the next forward pass, which needs the room
        schedule.step()
    with torch.no_grad():
        after = task.error(judged(), relative=relative)
        if not math.isfinite(after) and not math.isfinite(before):
            raise UPQError(f"block {task.index}: the output is not finite even before training; check the weights")
        if not after <= before:
            for p, value in zip(learned, start, strict=True):
                p.copy_(value)
            after = before
    task.figures.update(objective_before=before, objective_after=after)
    return before, after


def _gradients(learned: list[Tensor]) -> Iterator[Tensor]:
    """Zeros in a process that has none of the batch's rows."""
    for p in learned:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        yield p.grad


def reconstruct_memory(
    sizes: Sizes, calibration: Calibration, *, batch_size: int, iterations: int, weights_kept: int
) -> Bytes:
    """What `reconstruct` holds at its peak. The method keeps `weights_kept` tensors a weight for the backward pass."""
    tokens, batch = calibration.tokens, min(batch_size, calibration.rows)
    moments = 2 if iterations > 1 else 0  # the peak of a first step comes before they are made
    held = sizes.matrices(copies=2 + moments)  # what learns, and its start
    kept = sizes.probe(bf16=calibration.bf16).kept(batch, tokens)
    size = 2 if calibration.bf16 else FP32  # bytes of what products write
    widest = size * batch * tokens * sizes.widest
    step = sizes.matrices(copies=weights_kept) + tensors(kept / widest, widest)
    if calibration.bf16:
        step += sizes.matrices(2)  # the weights that products read
    # The backward pass begins with the last linear: gradients of its weight and input.
    step += tensors(1, FP32 * sizes.largest) + sizes.forward(batch, tokens, size, residual=FP32)
    errors = sizes.matrices() + sizes.forward(min(8, calibration.rows), tokens, size, residual=FP32)
    return held + largest(step, errors)


def reconstruct_work(sizes: Sizes, calibration: Calibration, *, batch_size: int, iterations: int, moved: float) -> Work:
    """`moved`: bytes an iteration moves for each weight, beside Adam's 28."""
    batch = min(batch_size, calibration.rows)
    step = pass_work(sizes, calibration, rows=batch) * 3 + Work(0.0, (moved + 28) * sizes.linears)
    # The errors before and after: a pass over all rows, and the weights once more.
    errors = (pass_work(sizes, calibration) + Work(0.0, moved * sizes.linears)) * 2
    return step * iterations + errors

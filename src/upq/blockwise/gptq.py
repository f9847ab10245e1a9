"""GPTQ (arXiv 2210.17323): round column by column, and let the columns still free make up for each error."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from upq.blockwise._base import (
    METHODS,
    BlockTask,
    Calibration,
    Method,
    ScaleStart,
    Work,
    pass_work,
    start_scales,
    start_work,
)
from upq.core.config import Strict
from upq.core.errors import UPQError
from upq.core.scheme import PER_CHANNEL, QuantScheme
from upq.grids import GRIDS, Params
from upq.model.sizes import FP32, Bytes, Sizes, tensors
from upq.nn.fake_quant import Solution

ColumnOrder = Literal["natural", "activation"]
_COLUMNS = 128  # whose errors reach the columns behind them in one product


@METHODS.register("gptq")
class Gptq(Method):
    class Config(Strict):
        scale: ScaleStart = "mse"
        relative: bool = False  # each token's error over its output's own size
        damp: float = Field(0.01, gt=0)  # added to the Hessian's diagonal, as a share of its mean
        order: ColumnOrder = "natural"  # activation: columns of the largest inputs are rounded first

    needs_inputs = True
    cost = 6.0

    def __init__(self, config: Config) -> None:
        self.config = config

    def memory(self, sizes: Sizes, calibration: Calibration) -> Bytes:
        return sizes.matrices() + gptq_memory(sizes, calibration)

    def work(self, sizes: Sizes, calibration: Calibration) -> Work:
        return start_work(sizes, calibration, self.config.scale) + gptq_work(sizes, calibration)

    def solve(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
        relative = self.config.relative
        scales = start_scales(task, scheme, self.config.scale, relative=relative)
        damp, order = self.config.damp, self.config.order
        latents = compensated_block(task, scales, scheme, damp=damp, relative=relative, order=order)
        grid = GRIDS.get(scheme.grid)
        schemes = {name: task.scheme(name, scheme) for name in latents}
        return {
            name: Solution(grid.fake(latent_OI, scales[name], schemes[name]), scales[name], schemes[name])
            for name, latent_OI in latents.items()
        }


def gptq_memory(sizes: Sizes, calibration: Calibration) -> Bytes:
    """What `compensated_block` holds at its peak, beside the latents.

    The largest Hessian with its damped form, factors and inverse; four forms of its weight.
    """
    hessian = tensors(5, FP32 * max(sizes.inputs) ** 2)
    passing = sizes.forward(min(8, calibration.rows), calibration.tokens)
    return hessian + tensors(4, FP32 * sizes.largest) + passing


def gptq_work(sizes: Sizes, calibration: Calibration) -> Work:
    """What `compensated_block` computes."""
    tokens = calibration.rows * calibration.tokens
    passes = pass_work(sizes, calibration) * len(sizes.inputs)
    hessians = Work(sum(2.0 * tokens * i**2 + 3.0 * i**3 for i in sizes.inputs))
    columns = Work(sum(6.0 * o * i**2 for o, i in sizes.shapes), 200.0 * sizes.linears)
    return passes + hessians + columns


@torch.no_grad()
def compensated_block(
    task: BlockTask,
    scales: dict[str, Params],
    scheme: QuantScheme,
    *,
    damp: float,
    relative: bool,
    order: ColumnOrder = "natural",
) -> dict[str, Tensor]:
    """Latents of all weights of a block, in the order of its products. The block is left with rounded weights."""
    grid, latents = GRIDS.get(scheme.grid), dict[str, Tensor]()
    original = task.weights()
    for group in task.groups():
        # The groups before this one are already rounded in the block, so their error is part of the input.
        moments = task.second_moments(group[:1], full=True, relative=relative)[group[0]]
        for name in group:
            matrix, own = task.matrices[name], task.scheme(name, scheme)
            of_experts = zip(
                original[name].chunk(max(1, matrix.experts)),
                moments if matrix.experts else moments[None],
                _rows(scales[name], max(1, matrix.experts)),
                strict=True,
            )
            try:
                parts = [compensated(w, h, params, own, damp=damp, order=order) for w, h, params in of_experts]
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                where = f"block {task.index}, {name}"
                raise UPQError(f"gptq: {where}: the Hessian is singular; raise damp above {damp}") from None
            latents[name] = torch.cat(parts)
            matrix.write(task.block, grid.fake(latents[name], scales[name], own))
    return {name: latents[name] for name in original}


def _rows(params: Params, parts: int) -> list[Params]:
    """Grid parameters of each part of the rows."""
    split = {key: value.chunk(parts) for key, value in params.items()}
    return [{key: value[part] for key, value in split.items()} for part in range(parts)]


def gptq(
    w_OI: Tensor,
    h_II: Tensor,
    params: Params,
    scheme: QuantScheme,
    *,
    damp: float = 0.01,
    order: ColumnOrder = "natural",
) -> Tensor:
    """Rounded weights (O, I) with a small `tr((Ŵ-W) H (Ŵ-W)ᵀ)`; `params` stay as they are."""
    latent_OI = compensated(w_OI, h_II, params, scheme, damp=damp, order=order)
    return GRIDS.get(scheme.grid).fake(latent_OI, params, scheme).to(w_OI.dtype)


def compensated(
    w_OI: Tensor,
    h_II: Tensor,
    params: Params,
    scheme: QuantScheme,
    *,
    damp: float = 0.01,
    order: ColumnOrder = "natural",
) -> Tensor:
    """Latents (O, I) that the grid rounds as GPTQ does: each weight with what earlier errors have added to it.

    Row by row the better of GPTQ and nearest rounding is kept: greedy compensation has no guarantee of its own.
    """
    grid, dtype, inputs = GRIDS.get(scheme.grid), h_II.dtype, w_OI.shape[1]
    mean = h_II.diagonal().mean()
    unit_II = torch.eye(inputs, dtype=dtype, device=h_II.device)
    # Behind a norm of zeros, or in an expert that no token reached, nothing is read: every rounding is as good.
    h_II = h_II + damp * mean * unit_II if mean != 0 else unit_II
    # Of equal inputs the first comes first. Groups stay where they are, whatever the order of their columns.
    largest_first = order == "activation"
    order_I = h_II.diagonal().argsort(descending=True, stable=True) if largest_first else torch.arange(inputs)
    original_II, h_II = h_II, h_II[order_I][:, order_I] if largest_first else h_II
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(h_II))
    u_II = torch.linalg.cholesky(inverse_II, upper=True)
    free_IO = w_OI.to(dtype).T.contiguous()  # a column of the weight is a row here: 3 times as fast
    free_IO = free_IO[order_I] if largest_first else free_IO
    column = replace(scheme, group_size=PER_CHANNEL)
    of_column = (order_I // (inputs // scheme.groups(inputs))).tolist()  # its group
    for start in range(0, inputs, _COLUMNS):
        end = min(start + _COLUMNS, inputs)
        errors_CO = torch.zeros_like(free_IO[start:end])
        for k in range(start, end):
            # One column with its group's parameters: the grid stays a black box.
            group = {key: v[:, of_column[k], None] if v.shape[1] > 1 else v for key, v in params.items()}
            rounded_O = grid.fake(free_IO[k, :, None], group, column)[:, 0].to(dtype)
            errors_CO[k - start] = (free_IO[k] - rounded_O) / u_II[k, k]
            free_IO[k + 1 : end].addr_(u_II[k, k + 1 : end], errors_CO[k - start], alpha=-1)
        free_IO[end:].addmm_(u_II[start:end, end:].T, errors_CO, alpha=-1)
    free_OI, h_II = (free_IO[order_I.argsort()] if largest_first else free_IO).T, original_II
    rounded_OI, nearest_OI = (grid.fake(each.contiguous(), params, scheme).to(dtype) for each in (free_OI, w_OI))
    better_O = objective(rounded_OI, w_OI, h_II) < objective(nearest_OI, w_OI, h_II)
    return torch.where(better_O[:, None], free_OI, w_OI.to(dtype)).to(w_OI.dtype)


def objective(rounded_OI: Tensor, w_OI: Tensor, h_II: Tensor) -> Tensor:
    """`(ŵ-w) H (ŵ-w)ᵀ` for each row: the expected squared error of an output."""
    d_OI = (rounded_OI - w_OI).to(h_II.dtype)
    return ((d_OI @ h_II) * d_OI).sum(-1)

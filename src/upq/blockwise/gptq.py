"""GPTQ (arXiv 2210.17323): round column by column, and let the columns still free make up for each error."""

from __future__ import annotations

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
from upq.core.scheme import QuantScheme
from upq.grids import GRIDS, Params
from upq.model.sizes import FP32, Bytes, Sizes, tensors
from upq.nn.fake_quant import Solution


@METHODS.register("gptq")
class Gptq(Method):
    class Config(Strict):
        scale: ScaleStart = "mse"
        damp: float = Field(0.01, gt=0)  # added to the Hessian's diagonal, as a share of its mean

    needs_inputs = True
    cost = 6.0

    def __init__(self, config: Config) -> None:
        self.config = config

    def memory(self, sizes: Sizes, calibration: Calibration) -> Bytes:
        # The solutions; the largest Hessian with its damped form, factors and inverse; four forms of its weight.
        hessian = tensors(5, FP32 * max(sizes.inputs) ** 2)
        passing = sizes.forward(min(8, calibration.rows), calibration.tokens)
        return sizes.matrices() + hessian + tensors(4, FP32 * sizes.largest) + passing

    def work(self, sizes: Sizes, calibration: Calibration) -> Work:
        tokens = calibration.rows * calibration.tokens
        passes = pass_work(sizes, calibration) * len(sizes.inputs)
        hessians = Work(sum(2.0 * tokens * i**2 + 3.0 * i**3 for i in sizes.inputs))
        columns = Work(sum(6.0 * o * i**2 for o, i in sizes.shapes), 200.0 * sizes.linears)
        return start_work(sizes, calibration, self.config.scale) + passes + hessians + columns

    def solve(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
        scales = start_scales(task, scheme, self.config.scale)
        solutions: dict[str, Solution] = {}
        original = task.weights()
        for group in task.groups():
            # The groups before this one are already rounded in the block, so their error is part of the input.
            moments = task.second_moments(group[:1], full=True)[group[0]]
            for name in group:
                matrix = task.matrices[name]
                of_experts = zip(
                    original[name].chunk(max(1, matrix.experts)),
                    moments if matrix.experts else moments[None],
                    _rows(scales[name], max(1, matrix.experts)),
                    strict=True,
                )
                try:
                    parts = [gptq(w, h, params, scheme, damp=self.config.damp) for w, h, params in of_experts]
                except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                    where = f"block {task.index}, {name}"
                    raise UPQError(
                        f"gptq: {where}: the Hessian is singular; raise damp above {self.config.damp}"
                    ) from None
                rounded_OI = torch.cat(parts)
                solutions[name] = Solution(rounded_OI, scales[name], scheme)
                matrix.write(task.block, rounded_OI)
        return solutions


def _rows(params: Params, parts: int) -> list[Params]:
    """Grid parameters of each part of the rows."""
    split = {key: value.chunk(parts) for key, value in params.items()}
    return [{key: value[part] for key, value in split.items()} for part in range(parts)]


def gptq(w_OI: Tensor, h_II: Tensor, params: Params, scheme: QuantScheme, *, damp: float = 0.01) -> Tensor:
    """Rounded weights (O, I) with a small `tr((Ŵ-W) H (Ŵ-W)ᵀ)`; `params` stay as they are.

    Row by row the better of GPTQ and nearest rounding is kept: greedy compensation has no guarantee of its own.
    """
    grid, dtype = GRIDS.get(scheme.grid), h_II.dtype
    mean = h_II.diagonal().mean()
    unit_II = torch.eye(len(h_II), dtype=dtype, device=h_II.device)
    # Behind a norm of zeros, or in an expert that no token reached, nothing is read: every rounding is as good.
    h_II = h_II + damp * mean * unit_II if mean != 0 else unit_II
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(h_II))
    u_II = torch.linalg.cholesky(inverse_II, upper=True)
    free_OI = w_OI.to(dtype).clone()
    rounded_OI = torch.empty_like(free_OI)
    size = w_OI.shape[1] // scheme.groups(w_OI.shape[1])
    for start in range(0, w_OI.shape[1], size):
        end = start + size
        group = {k: v[:, start // size, None] for k, v in params.items()}
        column_scheme = QuantScheme(bits=scheme.bits, grid=scheme.grid, scale_dtype=scheme.scale_dtype)
        errors_OS = torch.zeros_like(free_OI[:, start:end])
        for k in range(start, end):
            # One column with the group's parameters: the grid stays a black box.
            rounded_OI[:, k] = grid.fake(free_OI[:, k, None], group, column_scheme)[:, 0].to(dtype)
            error_O = (free_OI[:, k] - rounded_OI[:, k]) / u_II[k, k]
            free_OI[:, k:end] -= error_O[:, None] * u_II[k, k:end]
            errors_OS[:, k - start] = error_O
        free_OI[:, end:] -= errors_OS @ u_II[start:end, end:]
    nearest_OI = grid.fake(w_OI, params, scheme).to(dtype)
    better_O = objective(rounded_OI, w_OI, h_II) < objective(nearest_OI, w_OI, h_II)
    return torch.where(better_O[:, None], rounded_OI, nearest_OI).to(w_OI.dtype)


def objective(rounded_OI: Tensor, w_OI: Tensor, h_II: Tensor) -> Tensor:
    """`(ŵ-w) H (ŵ-w)ᵀ` for each row: the expected squared error of an output."""
    d_OI = (rounded_OI - w_OI).to(h_II.dtype)
    return ((d_OI @ h_II) * d_OI).sum(-1)

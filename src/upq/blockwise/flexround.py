"""FlexRound (arXiv 2306.00317): learn, for every weight, a divisor before rounding, with the block's output as judge.

    Ŵ = Δ · Q(W / exp(log Δ + S2 + s3)),   S2 (O, I) and s3 (O, 1) zero at the start

A weight's divisor moves it across a rounding boundary in proportion to its size, so large weights travel further.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from upq.blockwise._base import METHODS, BlockTask, Calibration, Method, ScaleStart, Work, start_scales, start_work
from upq.blockwise._reconstruct import reconstruct, reconstruct_memory, reconstruct_work
from upq.core.config import Strict
from upq.core.scheme import QuantScheme
from upq.grids import GRIDS, learned, stretches_of_rows
from upq.model.sizes import Bytes, Sizes
from upq.nn.fake_quant import Solution


class _Divided(torch.autograd.Function):
    """W / exp(S2 + s3), which is all that its gradient needs: autograd would keep the exponential too."""

    @staticmethod
    def forward(ctx: Any, w_OI: Tensor, s2_OI: Tensor, s3_O1: Tensor) -> Tensor:
        divided_OI = torch.empty_like(w_OI)
        for rows in stretches_of_rows(w_OI):
            torch.add(s2_OI[rows], s3_O1[rows], out=divided_OI[rows]).neg_().exp_().mul_(w_OI[rows])
        ctx.save_for_backward(divided_OI)
        return divided_OI

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        (divided_OI,), (g_OI,) = ctx.saved_tensors, grads
        d_s2_OI, d_s3_O1 = torch.empty_like(divided_OI), torch.empty_like(divided_OI[:, :1])
        for rows in stretches_of_rows(divided_OI):
            d = torch.mul(g_OI[rows], divided_OI[rows], out=d_s2_OI[rows]).neg_()
            d_s3_O1[rows] = d.sum(1, keepdim=True)
        return None, d_s2_OI, d_s3_O1


@METHODS.register("flexround")
class FlexRound(Method):
    class Config(Strict):
        scale: ScaleStart = "mse"
        relative: bool = False  # each token's error over its output's own size
        iterations: int = Field(400, ge=1)
        batch_size: int = Field(4, ge=1)
        lr: float = Field(3e-3, gt=0)

    needs_inputs = True
    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def cost(self) -> float:
        return 3.0 * self.config.iterations * self.config.batch_size

    def memory(self, sizes: Sizes, calibration: Calibration) -> Bytes:
        return reconstruct_memory(
            sizes,
            calibration,
            batch_size=self.config.batch_size,
            iterations=self.config.iterations,
            weights_kept=2,  # of the backward pass: the divided weight and its level
        )

    def work(self, sizes: Sizes, calibration: Calibration) -> Work:
        return start_work(sizes, calibration, self.config.scale) + reconstruct_work(
            sizes,
            calibration,
            batch_size=self.config.batch_size,
            iterations=self.config.iterations,
            moved=260,
        )

    def solve(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
        grid, weights = GRIDS.get(scheme.grid), task.weights()
        schemes = {name: task.scheme(name, scheme) for name in weights}
        params = start_scales(task, scheme, self.config.scale, relative=self.config.relative)
        s2 = {name: torch.zeros_like(w_OI) for name, w_OI in weights.items()}
        s3 = {name: torch.zeros_like(w_OI[:, :1]) for name, w_OI in weights.items()}

        def divided(name: str) -> Tensor:
            found: Tensor = _Divided.apply(weights[name], s2[name], s3[name])  # type: ignore[no-untyped-call]
            return found

        def quantised() -> dict[str, Tensor]:
            return {name: grid.fake(divided(name), params[name], schemes[name]) for name in weights}

        of_grid = [p for name, each in params.items() for p in learned(each, schemes[name]).values()]
        leaves = [*s2.values(), *s3.values(), *of_grid]
        for tensor in leaves:
            tensor.requires_grad_()
        reconstruct(
            task,
            quantised,
            [{"params": leaves, "lr": self.config.lr}],
            relative=self.config.relative,
            iterations=self.config.iterations,
            batch_size=self.config.batch_size,
        )
        return {
            name: Solution(divided(name).detach(), {k: v.detach() for k, v in params[name].items()}, schemes[name])
            for name in weights
        }

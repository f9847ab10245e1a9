"""Block-AP (EfficientQAT, arXiv 2407.11062): train all weights and scales of one block against its original output.

Freer than FlexRound, whose weights keep their sign; at 2 bits most of the error is won back by moving weights.
`start: gptq` begins where GPTQ ends, whose errors make up for one another. The few weights that make an attention
sink need that: SmolLM2-135M's comes out of two neurons whose rounded weights must cancel in all channels but one
(LOG.md, "The attention sink").
"""

from __future__ import annotations

import math
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
from upq.blockwise._reconstruct import Groups, reconstruct, reconstruct_memory, reconstruct_work
from upq.blockwise.gptq import compensated_block, gptq_memory, gptq_work
from upq.core.config import Strict
from upq.core.scheme import QuantScheme
from upq.grids import GRIDS, ZERO, learned
from upq.model.sizes import Bytes, Sizes, largest
from upq.nn.fake_quant import Solution, rms


@METHODS.register("block_ap")
class BlockAp(Method):
    class Config(Strict):
        scale: ScaleStart = "mse"
        start: Literal["nearest", "gptq"] = "nearest"  # of the weights
        damp: float = Field(0.01, gt=0)  # of gptq's Hessian: added to its diagonal, as a share of its mean
        relative: bool = False  # each token's error over its output's own size
        iterations: int = Field(400, ge=1)
        batch_size: int = Field(4, ge=1)
        lr: float = Field(1e-2, gt=0)  # of the weights, in units of each matrix's RMS
        scale_lr: float = Field(3e-3, gt=0)  # on the grid's own parameters
        zero_lr: float | None = Field(None, ge=0)  # on zero points, in codes; None: scale_lr
        final_lr: float = Field(0.0, ge=0, le=1)  # where the cosine ends, as a share of the rates

    needs_inputs = True
    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def cost(self) -> float:
        return 3.0 * self.config.iterations * self.config.batch_size

    def memory(self, sizes: Sizes, calibration: Calibration) -> Bytes:
        learning = reconstruct_memory(
            sizes,
            calibration,
            batch_size=self.config.batch_size,
            iterations=self.config.iterations,
            weights_kept=1,  # of the backward pass: the weight's level
        )
        if self.config.start == "nearest":
            return learning
        return sizes.matrices() + largest(learning, sizes.matrices() + gptq_memory(sizes, calibration))

    def work(self, sizes: Sizes, calibration: Calibration) -> Work:
        start = start_work(sizes, calibration, self.config.scale)
        if self.config.start == "gptq":
            start += gptq_work(sizes, calibration) + pass_work(sizes, calibration)
        return start + reconstruct_work(
            sizes,
            calibration,
            batch_size=self.config.batch_size,
            iterations=self.config.iterations,
            moved=180,
        )

    def solve(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
        grid = GRIDS.get(scheme.grid)
        relative = self.config.relative
        schemes = {name: task.scheme(name, scheme) for name in task.matrices}
        params = start_scales(task, scheme, self.config.scale, relative=relative)
        nearest = {name: w_OI.clone() for name, w_OI in task.weights().items()}
        latents, bound = nearest, math.inf
        if self.config.start == "gptq":
            with torch.no_grad():
                rounded = {name: grid.fake(w_OI, params[name], schemes[name]) for name, w_OI in nearest.items()}
                bound = task.error(rounded, relative=relative)
            del rounded
            latents = compensated_block(task, params, scheme, damp=self.config.damp, relative=relative)
        start_params = {name: {key: tensor.clone() for key, tensor in each.items()} for name, each in params.items()}
        for latent in latents.values():
            latent.requires_grad_()
        named = [item for name, each in params.items() for item in learned(each, schemes[name]).items()]
        for _, tensor in named:
            tensor.requires_grad_()

        def quantised() -> dict[str, Tensor]:
            return {name: grid.fake(latents[name], params[name], schemes[name]) for name in latents}

        apart = self.config.zero_lr is not None
        scales = [p for key, p in named if not (apart and key == ZERO)]
        zeros = [p for key, p in named if apart and key == ZERO]
        groups: Groups = [{"params": [latent], "lr": self.config.lr * rms(latent)} for latent in latents.values()]
        if scales:
            groups.append({"params": scales, "lr": self.config.scale_lr})
        if zeros:
            groups.append({"params": zeros, "lr": self.config.zero_lr})
        _, after = reconstruct(
            task,
            quantised,
            groups,
            relative=relative,
            iterations=self.config.iterations,
            batch_size=self.config.batch_size,
            final_lr=self.config.final_lr,
        )
        if not after <= bound:  # GPTQ's start has no guarantee of its own
            latents, params = nearest, start_params
        return {
            name: Solution(latents[name].detach(), {k: v.detach() for k, v in params[name].items()}, schemes[name])
            for name in latents
        }

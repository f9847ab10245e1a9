"""Block-AP (EfficientQAT, arXiv 2407.11062): train all weights and scales of one block against its original output.

Freer than FlexRound, whose weights keep their sign; at 2 bits most of the error is won back by moving weights.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from upq.blockwise._base import METHODS, BlockTask, Calibration, Method, ScaleStart, Work, start_scales, start_work
from upq.blockwise._reconstruct import reconstruct, reconstruct_memory, reconstruct_work
from upq.core.config import Strict
from upq.core.scheme import QuantScheme
from upq.grids import GRIDS
from upq.model.sizes import Bytes, Sizes
from upq.nn.fake_quant import Solution, rms


@METHODS.register("block_ap")
class BlockAp(Method):
    class Config(Strict):
        scale: ScaleStart = "mse"
        relative: bool = False  # each token's error over its output's own size
        iterations: int = Field(400, ge=1)
        batch_size: int = Field(4, ge=1)
        lr: float = Field(1e-2, gt=0)  # of the weights, in units of each matrix's RMS
        scale_lr: float = Field(3e-3, gt=0)  # on the grid's own parameters

    needs_inputs = True

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
            weights_kept=1,  # of the backward pass: the weight's level
        )

    def work(self, sizes: Sizes, calibration: Calibration) -> Work:
        return start_work(sizes, calibration, self.config.scale) + reconstruct_work(
            sizes,
            calibration,
            batch_size=self.config.batch_size,
            iterations=self.config.iterations,
            moved=180,
        )

    def solve(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
        grid = GRIDS.get(scheme.grid)
        latents = {name: w_OI.clone().requires_grad_() for name, w_OI in task.weights().items()}
        params = start_scales(task, scheme, self.config.scale)
        for each in params.values():
            for tensor in each.values():
                tensor.requires_grad_()

        def quantised() -> dict[str, Tensor]:
            return {name: grid.fake(latents[name], params[name], scheme) for name in latents}

        scales = [p for each in params.values() for p in each.values()]
        reconstruct(
            task,
            quantised,
            [
                *({"params": [latent], "lr": self.config.lr * rms(latent)} for latent in latents.values()),
                {"params": scales, "lr": self.config.scale_lr},
            ],
            relative=self.config.relative,
            iterations=self.config.iterations,
            batch_size=self.config.batch_size,
        )
        return {
            name: Solution(latents[name].detach(), {k: v.detach() for k, v in params[name].items()}, scheme)
            for name in latents
        }

"""Nearest rounding: every weight to its closest level, the scale by range or by search."""

from __future__ import annotations

from upq.blockwise._base import METHODS, BlockTask, Method, ScaleStart, start_scales
from upq.core.config import Strict
from upq.core.scheme import QuantScheme
from upq.nn.fake_quant import Solution


@METHODS.register("rtn")
class Rtn(Method):
    class Config(Strict):
        scale: ScaleStart = "max"

    cost = 1.0

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def needs_inputs(self) -> bool:
        return self.config.scale == "hessian"

    def solve(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
        scales = start_scales(task, scheme, self.config.scale)
        return {name: Solution(w_OI, scales[name], scheme) for name, w_OI in task.weights().items()}

"""Nearest rounding: every weight to its closest level, the scale by range or by search."""

from __future__ import annotations

from upq.blockwise._base import (
    METHODS,
    BlockTask,
    Calibration,
    Method,
    ScaleStart,
    Work,
    start_memory,
    start_scales,
    start_work,
)
from upq.core.config import Strict
from upq.core.scheme import QuantScheme
from upq.model.sizes import Bytes, Sizes
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

    def memory(self, sizes: Sizes, calibration: Calibration) -> Bytes:
        return start_memory(sizes, calibration, self.config.scale)

    def work(self, sizes: Sizes, calibration: Calibration) -> Work:
        return start_work(sizes, calibration, self.config.scale)

    def solve(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
        scales = start_scales(task, scheme, self.config.scale)
        return {name: Solution(w_OI, scales[name], task.scheme(name, scheme)) for name, w_OI in task.weights().items()}

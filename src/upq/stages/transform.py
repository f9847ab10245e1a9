"""Stage `transform`: the original's weights change and its function does not, so that later stages lose less."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from upq.core.config import Plugin
from upq.data.config import Data
from upq.files.tensors import INDEX
from upq.model.sizes import FP32, tensors
from upq.model.source import Source
from upq.stages._base import Demands, Job, ModelState, Planned, Reading, Stage, register
from upq.stages._sizes import Machine, Need, Sizes, need
from upq.transforms import TRANSFORMS, Transform, write_transformed

_COPIES = 3  # of the largest weight in float64, while it is turned


@register("transform")
class Transformed(Stage):
    """A copy of the original in float32, transformed, which the stages after this one read in its place."""

    transforms: ClassVar[bool] = True

    method: Plugin

    def transform(self) -> Transform:
        cls = TRANSFORMS.get(self.method.name)
        return cls(self.method.options(cls.Config, f"transform {self.method.name}"))

    def check(self, name: str, model: Source, data: Data) -> None:
        self.transform().check(name, model)

    def demands(self, data: Data) -> Demands:
        return Demands()

    def cost(self, name: str, blocks: int, reading: Reading) -> dict[str, tuple[int, float]]:
        return {name: (blocks, blocks * 500.0)}  # reading, two products and writing: as 500 tokens through a block

    def need(self, name: str, sizes: Sizes, machine: Machine, planned: Planned) -> dict[str, Need]:
        peak = sizes.matrices(copies=1) + tensors(_COPIES, 2 * FP32 * sizes.largest)
        written = FP32 * sizes.all
        return {name: need(0, peak, written, flops=4.0 * sizes.all * sizes.hidden, moved=2.0 * written)}

    def run(self, job: Job, state: ModelState) -> ModelState:
        folder = job.folder / "model"
        job.progress.start(job.name)
        with job.processes.shared_errors():
            if job.processes.first and not (folder / INDEX).is_file():
                write_transformed(job.source(), self.transform(), folder, job.progress)
        return replace(state, model=folder)

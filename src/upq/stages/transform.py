"""Stage `transform`: the original's weights change and its function does not, so that later stages lose less."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from upq.core.config import Plugin, neutral
from upq.data.config import Data
from upq.files.tensors import INDEX, load_tensors, save_tensors
from upq.model.sizes import FP32, Bytes, tensors
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
    samples: int = neutral(128, ge=1)  # calibration sequences of data.seq_len tokens, for methods that look at inputs

    def transform(self) -> Transform:
        cls = TRANSFORMS.get(self.method.name)
        return cls(self.method.options(cls.Config, f"transform {self.method.name}"))

    def line(self, name: str) -> str:
        options = "".join(f" {key}={value}" for key, value in (self.method.model_extra or {}).items())
        stays = self.transform().stays
        rest = f", but for {stays}, turned while the model runs" if stays else ""
        return f"{name}: {self.method.name}{options}, folded into the weights{rest}"

    def check(self, name: str, model: Source, data: Data) -> None:
        self.transform().check(name, model)

    def demands(self, data: Data) -> Demands:
        return Demands(rows=self.samples) if self.needs_inputs else Demands()

    @property
    def needs_inputs(self) -> bool:
        return self.transform().needs_inputs

    def cost(self, name: str, blocks: int, reading: Reading) -> dict[str, tuple[int, float]]:
        passes = 2.0 * self.samples * reading.seq_len if self.needs_inputs else 0.0
        # Reading, two products and writing take as long as 500 tokens through a block.
        return {name: (blocks, blocks * (500.0 + passes))}

    def need(self, name: str, sizes: Sizes, machine: Machine, planned: Planned) -> dict[str, Need]:
        peak = sizes.matrices(copies=1) + tensors(_COPIES, 2 * FP32 * sizes.largest)
        written = FP32 * sizes.all
        tokens, seq_len, flops = 0, planned.reading.seq_len, 4.0 * sizes.all * sizes.hidden
        if self.needs_inputs:
            tokens = self.samples * seq_len
            states = FP32 * tokens * sizes.hidden
            if planned.memory.activations == "disk":
                written += states
            else:
                peak += Bytes(states)
            peak += sizes.forward(min(8, self.samples), seq_len)
            flops += 2 * sizes.fp32.flops(self.samples, seq_len) * sizes.blocks
        return {name: need(tokens, peak, written, flops=flops, moved=2.0 * written)}

    def run(self, job: Job, state: ModelState) -> ModelState:
        folder = job.folder / "model"
        job.progress.start(job.name)
        with job.processes.shared_errors():
            if job.processes.first and not (folder / INDEX).is_file():
                rows_NT = self._calibration(job) if self.needs_inputs else None
                with job.activations() as allocate:
                    write_transformed(
                        job.source(), self.transform(), folder, job.progress, rows_NT=rows_NT, allocate=allocate
                    )
        return replace(state, model=folder)

    def _calibration(self, job: Job) -> Tensor:
        """The rows (N, T) that the stage began with: the text may have been packed anew since, for a larger budget."""
        path = job.folder / "calibration.safetensors"
        if not path.is_file():
            save_tensors(path, {"tokens": job.rows().calibration(self.samples).to(torch.int32)})
        return load_tensors(path)[0]["tokens"].long()

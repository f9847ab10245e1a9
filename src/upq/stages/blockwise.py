"""Stage `blockwise`: weights become codes, one decoder block after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from upq.blockwise import METHODS, BlockStore, Method, walk
from upq.core.config import Plugin
from upq.core.precision import Precision
from upq.core.scheme import PER_CHANNEL, QuantScheme
from upq.data.config import Data
from upq.files.tensors import load_tensors, save_tensors
from upq.model.source import Source
from upq.stages._base import Demands, Job, ModelState, Planned, Reading, Stage, register
from upq.stages._need import blockwise_need
from upq.stages._sizes import Machine, Need, Sizes


@register("blockwise")
class Blockwise(Stage):
    """Codes on `grid` by a block-wise method, from the original's weights or from those of the stage before."""

    bits: int
    grid: str = "seq"
    group_size: int = PER_CHANNEL
    method: Plugin
    samples: int = Field(128, ge=1)  # calibration sequences of data.seq_len tokens
    precision: Precision = "auto"  # of the products; weights and hidden states are float32

    solves: ClassVar[bool] = True

    def scheme(self) -> QuantScheme:
        return QuantScheme(bits=self.bits, grid=self.grid, group_size=self.group_size)

    def solver(self) -> Method:
        cls = METHODS.get(self.method.name)
        return cls(self.method.options(cls.Config, f"method {self.method.name}"))

    def check(self, name: str, model: Source, data: Data) -> None:
        self.solver()
        for index in range(len(model)):
            for matrix in model.matrices(index):
                self.scheme().groups(matrix.inputs)

    def demands(self, data: Data) -> Demands:
        return Demands(rows=self.samples, start="codes")

    def cost(self, name: str, blocks: int, reading: Reading) -> dict[str, tuple[int, float]]:
        passes = 3.0 * self.samples + self.solver().cost
        return {name: (blocks, blocks * reading.seq_len * passes)}

    def need(self, name: str, sizes: Sizes, machine: Machine, planned: Planned) -> dict[str, Need]:
        on_disk, latents = planned.memory.activations == "disk", planned.keep == "latents"
        seq_len = planned.reading.seq_len
        return {name: blockwise_need(self, sizes, machine, seq_len=seq_len, on_disk=on_disk, latents=latents)}

    def run(self, job: Job, state: ModelState) -> ModelState:
        store = BlockStore(job.folder, self.scheme(), latents=job.keep == "latents")
        model = job.source()
        job.progress.start(job.name, done=store.done(len(model)))
        walk(
            model,
            self._calibration(job),
            self.solver(),
            store,
            given=state.solved,
            seed=job.seed,
            progress=job.progress,
            precision=job.settled(self.precision),
            activations=job.activations(),
            processes=job.processes,
            metrics=job.metrics,
        )
        built_on = state.built_on if state.solved is None else (*state.built_on, state.solved)
        return replace(state, solved=store, built_on=built_on, norms=None)

    def _calibration(self, job: Job) -> Tensor:
        """The rows (N, T) that the stage began with: the text may have been packed anew since, for a larger budget."""
        path = job.folder / "calibration.safetensors"
        with job.processes.shared_errors():
            if job.processes.first and not path.is_file():
                save_tensors(path, {"tokens": job.rows().calibration(self.samples).to(torch.int32)})
        with job.processes.shared_errors():
            rows_NT = load_tensors(path)[0]["tokens"].long()
        return rows_NT

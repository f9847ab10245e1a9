"""Stage `widths`: how many bits each linear gets, for the block-wise stages after it that are `mixed`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, field_validator

from upq.blockwise import Calibration, pass_work
from upq.blockwise import _widths as widths
from upq.core.config import digest, free
from upq.core.errors import UPQError
from upq.core.precision import Precision, computes_in_bf16
from upq.core.scheme import PER_CHANNEL, QuantScheme
from upq.data.config import Data
from upq.files.digests import digest_model_dir
from upq.files.tensors import load_tensors, save_tensors
from upq.grids import GRIDS, scheme_of
from upq.model.sizes import FP32, tensors
from upq.model.source import Source
from upq.stages._base import Demands, Job, ModelState, Planned, Reading, Stage, register
from upq.stages._sizes import Machine, Need, Sizes, need


@register("widths")
class Widths(Stage):
    """Exactly `mean` bits a weight on average, more where a block's output suffers most (upq.blockwise._widths)."""

    chooses_widths: ClassVar[bool] = True

    mean: float
    choices: tuple[int, ...] = (2, 3, 4)  # bits that a linear can get
    grid: str = "seq"
    group_size: int = PER_CHANNEL
    samples: int = Field(32, ge=1)  # calibration rows
    precision: Precision = "auto"
    file: str | None = free(None)  # where the measurement is kept, for other runs; taken from there if it is there

    @field_validator("choices")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) < 2 or sorted(set(value)) != list(value):
            raise ValueError("give two or more different numbers of bits, the smallest first")
        return value

    def _scheme(self, bits: int) -> QuantScheme:
        return scheme_of(bits=bits, grid=self.grid, group_size=self.group_size)

    def check(self, name: str, model: Source, data: Data) -> None:
        least, most = self.choices[0], self.choices[-1]
        if not least <= self.mean <= most:
            raise UPQError(
                f"{name}.mean={self.mean:g} cannot be met with {least} to {most} bits; change {name}.choices"
            )
        if GRIDS.get(self.grid).vectors:
            raise UPQError(
                f"{name}.grid: the measure rounds weight by weight, which {self.grid} has not; set {name}.grid=seq"
            )
        for bits in self.choices:
            for index in range(len(model)):
                for matrix in model.matrices(index):
                    self._scheme(bits).groups(matrix.inputs)

    def demands(self, data: Data) -> Demands:
        return Demands(rows=self.samples)

    def cost(self, name: str, blocks: int, reading: Reading) -> dict[str, tuple[int, float]]:
        passes = 3.0 + 4 * len(self.choices)  # most blocks have four groups of weights
        return {name: (blocks, blocks * reading.seq_len * passes * self.samples)}

    def need(self, name: str, sizes: Sizes, machine: Machine, planned: Planned) -> dict[str, Need]:
        bf16 = computes_in_bf16(self.precision, machine.device, sizes.hidden)
        rows, tokens = -(-self.samples // machine.processes), planned.reading.seq_len
        calibration = Calibration(rows, tokens, bf16)
        peak = sizes.matrices(copies=2) + tensors(2, FP32 * rows * tokens * sizes.hidden)
        peak += tensors(2, FP32 * sizes.largest) + sizes.forward(min(8, rows), tokens)
        work = pass_work(sizes, calibration) * (3.0 + 4 * len(self.choices)) * sizes.blocks
        return {name: need(self.samples * tokens, peak, 0, flops=work.flops, moved=work.moved, bf16=bf16)}

    def run(self, job: Job, state: ModelState) -> ModelState:
        source, kept = job.source(), job.folder / "calibration.safetensors"
        with job.processes.shared_errors():
            if job.processes.first and not kept.is_file():
                save_tensors(kept, {"tokens": job.rows().calibration(self.samples).to(torch.int32)})
        with job.processes.shared_errors():
            rows_NT = load_tensors(kept)[0]["tokens"].long()
            key = digest(digest_model_dir(job.model), rows_NT.tolist(), self.grid, self.group_size, list(self.choices))
            file = Path(self.file).expanduser() if self.file else None
            measured = widths.load(file, key) if file is not None and file.is_file() else None
        job.progress.start(job.name)
        if measured is None:
            measured = widths.measure(
                source,
                rows_NT,
                self._scheme(self.choices[0]),
                self.choices,
                folder=job.folder,
                progress=job.progress,
                bf16=job.settled(self.precision) == "bf16",
                activations=job.activations(),
                processes=job.processes,
            )
            with job.processes.shared_errors():
                if file is not None and job.processes.first:
                    widths.save(file, key, measured)
        else:
            job.progress.note(f"{job.name}: the measurement is that of {file}")
        found: list[dict[str, int]] = [{} for _ in range(len(source))]
        for each, bits in zip(measured, widths.allocate(measured, self.mean), strict=True):
            found[each.block] |= dict.fromkeys(each.names, bits)
        return replace(state, widths=tuple(found))

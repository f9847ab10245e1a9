"""Stage `blockwise`: weights become codes, one decoder block after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from upq.blockwise import METHODS, BlockStore, Method, Order, spans, walk
from upq.core.act_scheme import ActScheme
from upq.core.config import Plugin, neutral
from upq.core.errors import UPQError
from upq.core.precision import Precision
from upq.core.scales import REAL_SCALES
from upq.core.scheme import PER_CHANNEL, QuantScheme
from upq.data.config import Data, TextSource, of_domain
from upq.data.sources import sources_of
from upq.data.tokens import TokenSet
from upq.files.tensors import load_tensors, save_tensors
from upq.grids import GRIDS, scheme_of
from upq.model.layout import block_list
from upq.model.source import Source
from upq.nn.kv import attentions, check_kv
from upq.stages._base import Demands, Job, ModelState, Planned, Reading, Stage, register
from upq.stages._need import blockwise_need
from upq.stages._rows import check_length, own_rows
from upq.stages._sizes import Machine, Need, Sizes


@register("blockwise")
class Blockwise(Stage):
    """Codes on `grid` by a block-wise method, from the original's weights or from those of the stage before."""

    bits: int
    grid: str = "seq"
    group_size: int = PER_CHANNEL
    scale_dtype: str | None = neutral(None)  # of the stored scales; None: the grid's usual type
    method: Plugin
    samples: int = Field(128, ge=1)  # calibration rows
    seq_len: int | None = neutral(None, ge=8)  # their tokens; None: data.seq_len
    # What it calibrates on: the run's text, its sources of one domain, or sources of its own.
    calibration: str | tuple[TextSource, ...] | None = neutral(None)
    precision: Precision = "auto"  # of the products; weights and hidden states are float32
    window: int = neutral(1, ge=1)  # blocks that are solved together
    overlap: int = neutral(0, ge=0)  # of them with the next window
    grow: int = neutral(0, ge=0)  # windows at either end that grow from one block to so many
    inputs: Literal["quantised", "original"] = neutral("quantised")  # what a block reads while it is solved
    annealing: float = neutral(0.0, ge=0, le=1)  # share of the steps in which inputs go from original to quantised
    mixed: bool = neutral(False)  # each weight has the bits that a stage `widths` has chosen for it
    truncate: bool = neutral(False)  # cut outliers of the weights off before they are solved
    activations: ActScheme | None = neutral(None)  # how the inputs of the linears are rounded, from here on
    kv: ActScheme | None = neutral(None)  # how keys and values are rounded

    solves: ClassVar[bool] = True

    def scheme(self) -> QuantScheme:
        return scheme_of(bits=self.bits, grid=self.grid, group_size=self.group_size, scale_dtype=self.scale_dtype)

    def solver(self) -> Method:
        cls = METHODS.get(self.method.name)
        return cls(self.method.options(cls.Config, f"method {self.method.name}"))

    @property
    def order(self) -> Order:
        return Order(self.window, self.overlap, self.grow, self.annealing, self.inputs == "original")

    def check(self, name: str, model: Source, data: Data) -> None:
        method, order = self.solver(), self.order
        check_length(name, self.seq_len, model)
        if self.calibration is not None and not self._sources(name, data):
            raise UPQError(f"{name}.calibration: no sources; list some, or leave it out for the run's text")
        try:
            spans(len(model), order)
        except UPQError as error:
            raise UPQError(f"{name}.{error}") from None
        if not order.plain and order.apart:
            raise UPQError(f"{name}.inputs=original solves each block alone; set window=1, grow=0 and annealing=0")
        if not (order.plain or method.learns):
            learning = ", ".join(each for each in METHODS.names() if METHODS.get(each).learns)
            raise UPQError(
                f"{name}: {self.method.name} does not learn on a block's output, so window, grow and annealing change"
                f" nothing; leave them out, or set {name}.method to one of {learning}"
            )
        grid = GRIDS.get(self.grid)
        if method.between_levels and not (grid.uniform and self.scheme().scale_dtype in REAL_SCALES):
            raise UPQError(
                f"{name}: {self.method.name} learns a rounding between evenly spaced levels on plain scales, which"
                f" grid {self.grid} has not; set {name}.method=gptq or block_ap"
            )
        if method.vectors != grid.vectors:
            fits = ", ".join(n for n in METHODS.names() if METHODS.get(n).vectors == grid.vectors)
            kind = "vectors, which each have one code" if grid.vectors else "weights, which each have a code"
            raise UPQError(
                f"{name}: {self.method.name} does not solve grid {self.grid}, whose levels are those of {kind};"
                f" set {name}.method to one of {fits}" + ("" if grid.vectors else f", or {name}.grid=books")
            )
        if self.mixed and len(grid.widths) == 1:
            raise UPQError(f"{name}.mixed: grid {self.grid} has {grid.widths[0]} bits alone; set {name}.mixed=false")
        for index in range(len(model)):
            for matrix in model.matrices(index):
                grid.check_columns(matrix.inputs, self.scheme())
                if grid.vectors and matrix.experts:
                    raise UPQError(
                        f"{name}: {matrix.name} of block {index} holds experts, and grid {self.grid} has one set of"
                        f" books a matrix; set {name}.grid=seq"
                    )
        self._check_activations(name, model)

    def _check_activations(self, name: str, model: Source) -> None:
        matrices = [matrix for index in range(len(model)) for matrix in model.matrices(index)]
        if self.activations is not None:
            size = self.activations.group_size or 1
            for matrix in matrices:
                if matrix.experts:
                    raise UPQError(
                        f"{name}.activations: inputs of experts ({matrix.name}) are not rounded yet; leave it out"
                    )
                if matrix.inputs % size:
                    raise UPQError(
                        f"{name}.activations: {matrix.name} has {matrix.inputs} inputs, no multiple of"
                        f" group_size={size}; set another"
                    )
            if self.activations.static and not (self.order.plain and not self.order.apart):
                raise UPQError(f"{name}.activations: static scales need window=1, grow=0 and inputs=quantised")
        if self.kv is not None:
            check_kv(self.kv, f"{name}.kv")
            blocks = list(block_list(model.outline, model.layout))
            if not any(attentions(block) for block in blocks):
                raise UPQError(
                    f"{name}.kv: {type(blocks[0]).__name__} does not call transformers' attention interface, so its"
                    " keys and values are out of reach; leave it out"
                )

    def demands(self, data: Data) -> Demands:
        return Demands(rows=self.samples, start="codes", widths=self.mixed)

    def cost(self, name: str, blocks: int, reading: Reading) -> dict[str, tuple[int, float]]:
        solved = sum(len(span) for span in spans(blocks, self.order)) / blocks
        passes = 3.0 * self.samples + self.solver().cost * solved
        return {name: (blocks, blocks * (self.seq_len or reading.seq_len) * passes)}

    def need(self, name: str, sizes: Sizes, machine: Machine, planned: Planned) -> dict[str, Need]:
        on_disk, latents = planned.memory.activations == "disk", planned.keep == "latents"
        seq_len = self.seq_len or planned.reading.seq_len
        return {name: blockwise_need(self, sizes, machine, seq_len=seq_len, on_disk=on_disk, latents=latents)}

    def run(self, job: Job, state: ModelState) -> ModelState:
        widths = state.widths if self.mixed else ()
        latents = job.keep == "latents" and not GRIDS.get(self.grid).vectors  # a search has no latents
        store = BlockStore(job.folder, self.scheme(), latents, widths, self.activations, self.kv)
        model = job.source()
        job.progress.start(job.name, done=store.done(len(model)))
        walk(
            model,
            self._calibration(job, state),
            self.solver(),
            store,
            given=state.solved,
            seed=job.seed,
            progress=job.progress,
            precision=job.settled(self.precision),
            activations=job.activations(),
            processes=job.processes,
            metrics=job.metrics,
            order=self.order,
            truncate=self.truncate,
        )
        built_on = state.built_on if state.solved is None else (*state.built_on, state.solved)
        return replace(state, solved=store, built_on=built_on, norms=None)

    def _calibration(self, job: Job, state: ModelState) -> Tensor:
        """The rows (N, T) that the stage began with: the text may have been packed anew since, for a larger budget."""
        path = job.folder / "calibration.safetensors"
        of_the_run = self.calibration is None and self.seq_len in (None, job.reading.seq_len)
        with job.processes.shared_errors():
            if job.processes.first and not path.is_file():
                rows = job.rows() if of_the_run else self._own(job, state)
                save_tensors(path, {"tokens": rows.calibration(self.samples).to(torch.int32)})
        with job.processes.shared_errors():
            rows_NT = load_tensors(path)[0]["tokens"].long()
        return rows_NT

    def _sources(self, name: str, data: Data) -> tuple[TextSource, ...]:
        if isinstance(self.calibration, str):
            return of_domain(sources_of(data), self.calibration, f"{name}.calibration")
        return sources_of(data) if self.calibration is None else self.calibration

    def _own(self, job: Job, state: ModelState) -> TokenSet:
        """Rows of the stage's own sources or length, without what the run holds out."""
        sources = self._sources(job.name, job.data) + (state.text if self.calibration is None else ())
        path = job.folder / "text.safetensors"
        found = own_rows(job, path, sources, rows=self.samples, seq_len=self.seq_len)
        if len(found.tokens_NT) < self.samples:
            job.progress.note(
                f"{job.name}: {len(found.tokens_NT)} rows to calibrate on, {self.samples} are asked for; add text"
            )
        path.unlink()  # what is mapped stays readable
        return found

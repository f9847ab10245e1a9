"""Stage `distill`: what the blocks were solved to is trained to give the original's distributions."""

from __future__ import annotations

from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.data.config import Data
from upq.data.sources import sources_of
from upq.data.tokens import TokenSet
from upq.distill.config import Distill as Settings
from upq.distill.teacher import CachedTeacher, StreamedTeacher, write_cache
from upq.distill.trainer import steps
from upq.losses import LOSSES
from upq.model.source import Source
from upq.stages._base import Demands, Job, ModelState, Planned, Reading, Start, register
from upq.stages._need import distill_need, teacher_need
from upq.stages._rows import check_length, own_rows
from upq.stages._sizes import Machine, Need, Sizes
from upq.stages._training import TrainingStage


@register("distill")
class Distill(Settings, TrainingStage):
    """A training on the run's text."""

    def learns(self, scheme: QuantScheme) -> bool:
        return not self.tokens or super().learns(scheme)

    def check_start(self, name: str, scheme: QuantScheme) -> None:
        if self.tokens:
            super().check_start(name, scheme)

    def check(self, name: str, model: Source, data: Data) -> None:
        self.check_training(name, model)
        check_length(name, self.seq_len, model)
        if self.tokens > 0 and steps(self, data.seq_len) == 0:
            step = self.batch_size * (self.seq_len or data.seq_len)
            raise UPQError(f"{name}.tokens={self.tokens} is less than one step of {step} tokens")

    def demands(self, data: Data) -> Demands:
        number = steps(self, data.seq_len)
        start: Start = "latents" if self.train_weights and number else "codes"
        rows = -(-number * self.batch_size * (self.seq_len or data.seq_len) // data.seq_len)  # as much text
        return Demands(rows, start, codes_alone=number > 0 and not self.train_weights)

    @property
    def caches_teacher(self) -> bool:
        return self.tokens > 0 and self.teacher == "cached" and LOSSES.get(self.loss.name).uses_teacher

    def cost(self, name: str, blocks: int, reading: Reading) -> dict[str, tuple[int, float]]:
        total, seq_len = steps(self, reading.seq_len), self.seq_len or reading.seq_len
        rows, costs = total * self.batch_size, dict[str, tuple[int, float]]()
        if self.caches_teacher:
            cached = min(rows, reading.rows * reading.seq_len // seq_len)
            costs[f"{name}.teacher"] = (cached, cached * seq_len * blocks * 1.0)
        return costs | {name: (total, rows * seq_len * blocks * self.passes)}

    def need(self, name: str, sizes: Sizes, machine: Machine, planned: Planned) -> dict[str, Need]:
        assert planned.scheme is not None
        seq_len, found = self.seq_len or planned.reading.seq_len, dict[str, Need]()
        if self.caches_teacher:
            found[f"{name}.teacher"] = teacher_need(self, sizes, machine, seq_len=seq_len)
        found[name] = distill_need(
            self,
            sizes,
            machine,
            steps=steps(self, seq_len),
            seq_len=seq_len,
            scheme=planned.scheme,
            sharded=planned.sharded,
        )
        return found

    def run(self, job: Job, state: ModelState) -> ModelState:
        total = steps(self, job.reading.seq_len)
        if not total:
            job.progress.start(job.name)
            return state
        settings, data = self.model_copy(update={"precision": job.settled(self.precision)}), self._rows(job, state)
        cache = settings._cached(job, data) if self.caches_teacher else None
        return settings.train(job, state, data, steps=total, cache=cache)

    def _rows(self, job: Job, state: ModelState) -> TokenSet:
        """The run's rows, or the same text in rows of the training's own length, which the first process packs."""
        if self.seq_len in (None, job.reading.seq_len):
            return job.rows()
        rows = steps(self, job.reading.seq_len) * self.batch_size
        sources, path = (*sources_of(job.data), *state.text), job.folder / "text.safetensors"

        def packed() -> TokenSet:
            return own_rows(job, path, sources, rows=rows, seq_len=self.seq_len, loss_on=job.data.loss_on)

        with job.processes.shared_errors():
            if job.processes.first:
                packed()
        with job.processes.shared_errors():
            return packed()

    def _cached(self, job: Job, data: TokenSet) -> CachedTeacher:
        """The teacher's targets on disk, for every row that the training reads. The first process writes them."""
        rows = data.rows(0, steps(self, job.reading.seq_len) * self.batch_size)
        cache = CachedTeacher(job.folder / "teacher", tuple(dict.fromkeys(rows.tolist())))
        with job.processes.shared_errors():
            if job.processes.first:
                self._write(cache, job, data)
        return cache

    def _write(self, cache: CachedTeacher, job: Job, data: TokenSet) -> None:
        job.progress.start(f"{job.name}.teacher", done=cache.rows_done())
        if cache.rows_done() == len(cache.rows):
            return
        model = job.source()
        vocabulary = model.text.vocab_size
        size = cache.bytes(self.teacher_top_k, vocabulary, self.seq_len or job.reading.seq_len)
        kept = f"the {min(self.teacher_top_k, vocabulary)} likeliest of {vocabulary} tokens"
        job.progress.note(f"teacher: {kept} at each position of {len(cache.rows)} rows, {size / 1e6:,.2f} MB on disk")
        write_cache(cache, StreamedTeacher.of(model), data.tokens_NT, self, progress=job.progress)

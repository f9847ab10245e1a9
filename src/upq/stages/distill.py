"""Stage `distill`: what the blocks were solved to is trained to give the original's distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, TypeVar

import torch
from transformers import PreTrainedModel

from upq.blockwise import BlockStore
from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.data.config import Data
from upq.data.tokens import TokenSet
from upq.distill import optimizer, teacher
from upq.distill.config import Distill as Settings
from upq.distill.sharding import load_sharded
from upq.distill.student import load_student, make_student, norm_weight, norms, start_norms, trained_blocks
from upq.distill.teacher import CachedTeacher, StreamedTeacher, Teacher, write_cache
from upq.distill.trainer import distill, settled, skipped_steps, steps
from upq.files.tensors import load_tensors, save_tensors
from upq.grids import GRIDS
from upq.losses import LOSSES
from upq.model.layout import block_list, layout_of
from upq.model.loading import check_finite, load_model
from upq.model.source import Source
from upq.nn.trained import full_tensor
from upq.stages._base import Demands, Job, ModelState, Planned, Reading, Stage, Start, register
from upq.stages._need import distill_need, teacher_need
from upq.stages._sizes import Machine, Need, Saving, Sizes

T = TypeVar("T")


@register("distill")
class Distill(Settings, Stage):
    """Quantisation-aware training by distillation from the original (`upq.distill`)."""

    trains: ClassVar[bool] = True
    savings: ClassVar[tuple[Saving, ...]] = (
        Saving(1, ("chunk_tokens=256",)),
        Saving(2, ("micro_batch_size=1",)),
        Saving(6, ("gradient_checkpointing=true",)),
        Saving(7, ("teacher=offloaded",)),
        Saving(8, ("optimizer=adamw8bit",)),
        # Codes stay as the block-wise stage has left them.
        Saving(9, ("train_weights=false", "scale_lr=5e-3"), other_artefact=True),
    )

    def learns(self, scheme: QuantScheme) -> bool:
        return not self.tokens or self.train_weights or self.train_norms or GRIDS.get(scheme.grid).scales_learn

    def check(self, name: str, model: Source, data: Data) -> None:
        teacher.check(self)
        optimizer.check(self)
        loss = LOSSES.get(self.loss.name)
        self.loss.options(loss.Config, f"distill.loss {self.loss.name}")
        if self.tokens > 0 and steps(self, data.seq_len) == 0:
            step = self.batch_size * data.seq_len
            raise UPQError(f"{name}.tokens={self.tokens} is less than one step of {step} tokens")

    def demands(self, data: Data) -> Demands:
        number = steps(self, data.seq_len)
        start: Start = "latents" if self.train_weights and number else "codes"
        return Demands(number * self.batch_size, start, codes_alone=number > 0 and not self.train_weights)

    @property
    def caches_teacher(self) -> bool:
        return self.tokens > 0 and self.teacher == "cached" and LOSSES.get(self.loss.name).uses_teacher

    def cost(self, name: str, blocks: int, reading: Reading) -> dict[str, tuple[int, float]]:
        total = steps(self, reading.seq_len)
        rows, costs = total * self.batch_size, dict[str, tuple[int, float]]()
        if self.caches_teacher:
            cached = min(rows, reading.rows)
            costs[f"{name}.teacher"] = (cached, cached * reading.seq_len * blocks * 1.0)
        taught = LOSSES.get(self.loss.name).uses_teacher or self.hidden
        passes = 4.0 if taught and not self.caches_teacher else 3.0
        passes += self.gradient_checkpointing
        return costs | {name: (total, rows * reading.seq_len * blocks * passes)}

    def need(self, name: str, sizes: Sizes, machine: Machine, planned: Planned) -> dict[str, Need]:
        assert planned.scheme is not None
        seq_len, found = planned.reading.seq_len, dict[str, Need]()
        if self.caches_teacher:
            found[f"{name}.teacher"] = teacher_need(self, sizes, machine, seq_len=seq_len)
        found[name] = distill_need(
            self, sizes, machine, seq_len=seq_len, scheme=planned.scheme, sharded=planned.sharded
        )
        return found

    def run(self, job: Job, state: ModelState) -> ModelState:
        assert state.solved is not None
        total = steps(self, job.reading.seq_len)
        if not total:
            job.progress.start(job.name)
            return state
        return self.model_copy(update={"precision": job.settled(self.precision)})._train(job, state, total)

    def _train(self, job: Job, state: ModelState, total: int) -> ModelState:
        assert state.solved is not None
        assert state.solved.latents or not self.train_weights
        data = job.rows()
        cache = self._cached(job, data) if self.caches_teacher else None
        student, original = self._models(job, state.solved)
        before = {} if state.norms is None else load_tensors(state.norms)[0]
        if before and job.sharded:
            raise UPQError(
                f"{job.name}: an earlier stage trained the norms, and a sharded training cannot start from them; "
                "set memory.weights=replicated"
            )
        start_norms(student, before)
        config = settled(self, original, data)
        targets: Teacher = original if cache is None else cache
        del original  # what the student does not share of it goes, unless it gives the `targets`
        checkpoint = job.folder / "checkpoint.safetensors"
        with job.stop.held():
            distill(
                student,
                targets,
                data,
                config,
                total_steps=total,
                checkpoint=checkpoint,
                progress=job.progress,
                sharded=job.sharded,
                stop=job.stop,
                name=job.name,
                metrics=job.metrics,
            )
        norms_file = job.folder / "norms.safetensors"
        store = replace(state.solved, folder=job.folder, latents=job.keep == "latents" and self.train_weights)
        for index, solutions in trained_blocks(student):  # every process has a part of them
            if job.processes.first:
                store.save(index, solutions, state.solved.report(index), state.solved.massive(index))
        trained = norms(student) if self.train_norms else {}
        weights = before | {f"{path}.weight": full_tensor(norm_weight(norm).detach()) for path, norm in trained.items()}
        if weights and job.processes.first:
            save_tensors(norms_file, weights)
        skipped = (*state.skipped_steps, *skipped_steps(checkpoint)) if job.processes.first else ()
        return replace(state, solved=store, norms=norms_file if weights else None, skipped_steps=skipped)

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
        size = cache.bytes(self.teacher_top_k, vocabulary, job.reading.seq_len)
        kept = f"the {min(self.teacher_top_k, vocabulary)} likeliest of {vocabulary} tokens"
        job.progress.note(f"teacher: {kept} at each position of {len(cache.rows)} rows, {size / 1e6:,.2f} MB on disk")
        write_cache(cache, StreamedTeacher.of(model), data.tokens_NT, self, progress=job.progress)

    def _models(self, job: Job, solved: BlockStore) -> tuple[PreTrainedModel, PreTrainedModel | StreamedTeacher]:
        """Student and teacher before the training: whole, or with no more in memory than stays there."""
        resident = self.teacher == "resident"
        starts_of = solved.solutions if self.train_weights else solved.coded
        if resident and not job.sharded:
            original = load_model(job.model, dtype=torch.float32, device=job.device)
            original.requires_grad_(False)
            check_finite(original, job.model)
            starts = _by_path(original, starts_of)
            return make_student(original, starts, train_norms=self.train_norms), original
        model = job.source()
        if job.sharded:
            student, original = load_sharded(model, starts_of, train_norms=self.train_norms, keep=resident)
        else:
            student, original = load_student(model, starts_of, train_norms=self.train_norms)
        return student, original if resident else StreamedTeacher.of(model, original)


def _by_path(model: PreTrainedModel, of_block: Callable[[int], Mapping[str, T]]) -> dict[str, T]:
    """By module path what `of_block` gives by the names of a block's linears."""
    prefix, blocks = layout_of(model).blocks, range(len(block_list(model)))
    return {f"{prefix}.{i}.{name}": value for i in blocks for name, value in of_block(i).items()}

"""What the stages share that train: student and teacher from the solved blocks, the training, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from transformers import PreTrainedModel

from upq.blockwise import BlockStore
from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.data.tokens import TokenSet
from upq.distill import optimizer, teacher
from upq.distill.config import TrainingSettings
from upq.distill.sharding import load_sharded
from upq.distill.student import (
    load_student,
    make_student,
    norm_weight,
    norms,
    round_activations,
    start_norms,
    trained_blocks,
)
from upq.distill.teacher import CachedTeacher, StreamedTeacher, Teacher
from upq.distill.trainer import Batches, distill, settled, skipped_steps
from upq.files.tensors import load_tensors, save_tensors
from upq.grids import GRIDS
from upq.losses import LOSSES
from upq.model.layout import block_list, layout_of
from upq.model.loading import check_finite, load_model
from upq.model.source import Source
from upq.nn.ms_eden import BLOCK
from upq.nn.trained import full_tensor
from upq.stages._base import Job, ModelState, Stage
from upq.stages._sizes import Saving

T = TypeVar("T")


class TrainingStage(TrainingSettings, Stage):
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
        return self.train_weights or self.train_norms or GRIDS.get(scheme.grid).scales_learn

    def check_start(self, name: str, scheme: QuantScheme) -> None:
        if self.train_weights and GRIDS.get(scheme.grid).vectors:
            raise UPQError(
                f"{name}.train_weights: the codes of grid {scheme.grid} belong to vectors, and no single weight of them"
                f" trains; set {name}.train_weights=false, and books and scales will"
            )

    def check_training(self, name: str, model: Source) -> None:
        """Faults that every training may have. Raises UPQError."""
        teacher.check(self)
        optimizer.check(self)
        loss = LOSSES.get(self.loss.name)
        self.loss.options(loss.Config, f"{name}.loss {self.loss.name}")
        if self.backward is not None:
            for matrix in (matrix for index in range(len(model)) for matrix in model.matrices(index)):
                if matrix.outputs % BLOCK:
                    raise UPQError(
                        f"{name}.backward=nvfp4 rounds whole blocks of {BLOCK}, and {matrix.name} has {matrix.outputs}"
                        f" outputs; leave {name}.backward out"
                    )

    @property
    def passes(self) -> float:
        """Of a training token through a block, with its teacher's."""
        taught = LOSSES.get(self.loss.name).uses_teacher or self.hidden
        return 3.0 + bool(taught and self.teacher != "cached") + self.gradient_checkpointing

    def train(
        self,
        job: Job,
        state: ModelState,
        text: TokenSet,
        *,
        steps: int,
        cache: CachedTeacher | None = None,
        rows: Callable[[PreTrainedModel], Batches] | None = None,
        **options: Any,
    ) -> ModelState:
        """`steps` on `text`, or on the rows that `rows` makes of the student. `options` are those of `distill`."""
        assert state.solved is not None
        assert state.solved.latents or not self.train_weights
        student, original = self._models(job, state.solved)
        round_activations(student, state.solved.activations, state.solved.kv, state.solved.input_scales)
        before = {} if state.norms is None else load_tensors(state.norms)[0]
        if before and job.sharded:
            raise UPQError(
                f"{job.name}: an earlier stage trained the norms, and a sharded training cannot start from them; "
                "set memory.weights=replicated"
            )
        start_norms(student, before)
        config = settled(self, original, text)
        targets: Teacher = original if cache is None else cache
        del original  # what the student does not share of it goes, unless it gives the `targets`
        checkpoint = job.folder / "checkpoint.safetensors"
        with job.stop.held():
            distill(
                student,
                targets,
                text if rows is None else rows(student),
                config,
                total_steps=steps,
                checkpoint=checkpoint,
                progress=job.progress,
                sharded=job.sharded,
                stop=job.stop,
                name=job.name,
                metrics=job.metrics,
                **options,
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

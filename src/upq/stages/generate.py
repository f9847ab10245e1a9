"""Stage `generate`: the original writes conversations, which are then one more source of text."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.core.errors import UPQError
from upq.data.config import Data, Generated, TextSource
from upq.data.generated import check, write_conversations
from upq.data.prompts import questions
from upq.decoding import Batch, Unsuitable, batch, takes
from upq.files.atomic import atomic_write
from upq.model.loading import check_finite, context_of, generation_config, load_model, load_tokenizer
from upq.model.sharding import load_original, make_mesh
from upq.model.source import Source
from upq.stages._base import Demands, Job, ModelState, Planned, Reading, Stage, register
from upq.stages._need import compiled_need, generate_need
from upq.stages._sizes import Machine, Need, Saving, Sizes


@register("generate")
class Generate(Generated, Stage):
    """Conversations by the original model (`upq.data.generated`), of its share of the text that the run reads."""

    # Ranked after what a training mostly needs anyway: fewer conversations at a time take as many times longer.
    savings: ClassVar[tuple[Saving, ...]] = (Saving(4, ("batch_size=32",)), Saving(5, ("batch_size=8",)))

    def check(self, name: str, model: Source, data: Data) -> None:
        context = context_of(model.config)
        if self.questions == "data" and context is not None and self.max_new_tokens >= context:
            raise UPQError(
                f"{name}.max_new_tokens={self.max_new_tokens} leaves no room for a question in the model's context of"
                f" {context}; lower it"
            )

    def check_text(self, tokenizer: PreTrainedTokenizerBase, ends: list[int], rows: int) -> None:
        check(tokenizer, ends, rows)

    def demands(self, data: Data) -> Demands:
        return Demands()

    def cost(self, name: str, blocks: int, reading: Reading) -> dict[str, tuple[int, float]]:
        tokens = self.amount(reading)
        # One token at a time: on the reference model 130 µs a block, where a token of a training row takes 15.
        return {name: (tokens, tokens * blocks * 8.0)}

    def amount(self, reading: Reading) -> int:
        """Tokens to write: as set, or the share by weight of what the run reads."""
        if self.tokens is not None:
            return self.tokens
        return math.ceil(self.weight / (self.weight + reading.weight) * reading.tokens)

    def need(self, name: str, sizes: Sizes, machine: Machine, planned: Planned) -> dict[str, Need]:
        tokens = self.amount(planned.reading)
        if not (machine.gpus or planned.sharded) and takes(sizes.family):
            return {name: compiled_need(self, sizes, tokens=tokens)}
        return {name: generate_need(self, sizes, machine, tokens=tokens, sharded=planned.sharded)}

    def run(self, job: Job, state: ModelState) -> ModelState:
        section = self.model_copy(update={"tokens": self.amount(job.reading)})
        job.progress.start(job.name)
        mesh = make_mesh(job.device_type) if job.sharded else None
        with job.processes.shared_errors():
            model, tokenizer = _original(job, mesh), load_tokenizer(job.model)
            context, asked = context_of(model.config), list[list[dict[str, str]]]()
            if self.questions == "data":
                longest = None if context is None else context - self.max_new_tokens
                asked = questions(job.data, tokenizer, tokens=self.amount(job.reading), longest=longest, name=job.name)
        batches = write_conversations(
            job.folder / "batches",
            model,
            tokenizer,
            section,
            seed=job.seed,
            progress=job.progress,
            processes=job.processes,
            sharded=job.sharded,
            texts=_side_by_side(job, model, section.batch_size),
            questions=asked,
        )
        # One file for each amount: a later run may want more of the same batches.
        written = job.folder / f"conversations-{section.tokens}.jsonl"
        with job.processes.shared_errors():
            if job.processes.first:
                atomic_write(written, b"".join(file.read_bytes() for file in sorted(batches.iterdir())))
        return replace(state, text=(*state.text, TextSource(path=str(written), weight=self.weight)))


def _side_by_side(job: Job, model: PreTrainedModel, size: int) -> Batch[Any] | None:
    """The compiled decoder, where it takes the model."""
    try:
        return batch(model, size=size)
    except Unsuitable as reason:
        job.progress.note(f"{job.name}: transformers writes, batch by batch, not the compiled decoder: {reason}")
        return None


def _original(job: Job, mesh: DeviceMesh | None) -> PreTrainedModel:
    """The model that writes: whole, or cut over the processes of `mesh`."""
    own = Source(job.model, dtype="auto").dtype
    # On every CPU float32, so that all write the same conversations; and in float16 some models overflow.
    dtype = torch.float32 if job.device == "cpu" or own == torch.float16 else own
    if mesh is None:
        model = load_model(job.model, dtype=dtype, device=job.device)
        check_finite(model, job.model)
    else:
        model = load_original(job.source(dtype=dtype), mesh)
        model.generation_config = generation_config(job.model)
    return model

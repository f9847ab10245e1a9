"""Stage `on_policy`: the student writes answers, and is trained to give the original's distributions on them.

On-policy distillation (GKD, arXiv 2306.13649): reverse KL at every token that the student wrote itself, over the whole
vocabulary. It needs a start that can write, so a `distill` stands before it.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from upq.core.config import Plugin
from upq.core.errors import UPQError
from upq.data.config import Data
from upq.data.prompts import Prompt, prompts
from upq.losses import LOSSES, Loss
from upq.model.loading import context_of, load_tokenizer
from upq.model.source import Source
from upq.stages._answers import Written
from upq.stages._base import Demands, Job, ModelState, Planned, Reading, register
from upq.stages._need import distill_need, writing_need
from upq.stages._sizes import Machine, Need, Sizes
from upq.stages._training import TrainingStage


@register("on_policy")
class OnPolicy(TrainingStage):
    """A training on answers that the student writes to prompts of the run's own text."""

    loss: Plugin = Plugin(name="rkl")
    steps: int = Field(ge=1)  # optimiser steps
    temperature: float = Field(1.0, ge=0)  # of answers; 0: the likeliest token each time
    prompt_tokens: int = Field(256, ge=1)  # of a prompt, at most
    max_new_tokens: int = Field(256, ge=1)  # of an answer
    refresh: int = Field(10, ge=1)  # steps between two rounds of writing
    written_at_once: int = Field(32, ge=1)  # answers
    off_policy: float = Field(0.0, ge=0, lt=1)  # share of the steps that read the run's text in place of answers
    off_policy_loss: Plugin = Plugin(name="fkl")  # of those steps

    def check(self, name: str, model: Source, data: Data) -> None:
        self.check_training(name, model)
        self._off_policy_loss(name)
        if self.teacher == "cached":
            raise UPQError(
                f"{name}.teacher=cached holds the original's targets of rows that are there before the training, and"
                f" answers are not; set {name}.teacher=offloaded"
            )
        if not LOSSES.get(self.loss.name).uses_teacher:
            raise UPQError(f"{name}.loss={self.loss.name} would teach the student what it writes; set {name}.loss=rkl")
        if (limit := context_of(model.config)) is not None and self.longest > limit:
            raise UPQError(
                f"{name}: prompt_tokens={self.prompt_tokens} and max_new_tokens={self.max_new_tokens} are more than the"
                f" model's context of {limit}; lower one of them"
            )

    def check_text(self, tokenizer: PreTrainedTokenizerBase, ends: list[int], rows: int) -> None:
        if not ends:
            raise UPQError(
                "on_policy: the model has no end token, neither in its tokenizer nor in generation_config.json, so it"
                " ends no answer; leave the stage out"
            )

    @property
    def longest(self) -> int:
        """Tokens of a row."""
        return self.prompt_tokens + self.max_new_tokens

    def steps_off(self, step: int) -> int:
        """Of the first `step` steps those that read text: as many as the share says, evenly spread."""
        return int(self.off_policy * step + 1e-9)

    def reads_text(self, step: int) -> bool:
        return self.steps_off(step + 1) > self.steps_off(step)

    @property
    def answers(self) -> int:
        return (self.steps - self.steps_off(self.steps)) * self.batch_size

    def demands(self, data: Data) -> Demands:
        """One row at least: the rows held out say which prompts are not to be used."""
        rows = max(1, self.steps_off(self.steps) * self.batch_size)
        return Demands(rows, "latents" if self.train_weights else "codes", codes_alone=not self.train_weights)

    def cost(self, name: str, blocks: int, reading: Reading) -> dict[str, tuple[int, float]]:
        # Answers half as long as they may be; a token that is written takes as long as in `generate`.
        read = self.answers * (self.prompt_tokens + self.max_new_tokens / 2)
        read += self.steps_off(self.steps) * self.batch_size * reading.seq_len
        written = self.answers * self.max_new_tokens / 2
        return {name: (self.steps, blocks * (read * self.passes + written * 8.0))}

    def need(self, name: str, sizes: Sizes, machine: Machine, planned: Planned) -> dict[str, Need]:
        assert planned.scheme is not None
        seq_len = max(self.longest, planned.reading.seq_len if self.off_policy else 0)
        training = distill_need(
            self, sizes, machine, steps=self.steps, seq_len=seq_len, scheme=planned.scheme, sharded=planned.sharded
        )
        writing = writing_need(
            self, sizes, machine, answers=self.answers, prompt=self.prompt_tokens, limit=self.max_new_tokens,
            at_once=self.written_at_once, scheme=planned.scheme,
        )  # fmt: skip
        return {
            name: replace(
                training,
                memory=max(training.memory, writing.memory),
                loose=max(training.loose, writing.loose),
                disk=training.disk + writing.disk,
                flops=training.flops + writing.flops,
                moved=training.moved + writing.moved,
            )
        }

    def run(self, job: Job, state: ModelState) -> ModelState:
        settings, text = self.model_copy(update={"precision": job.settled(self.precision)}), job.rows()
        tokenizer = load_tokenizer(job.model)
        asked = list[Prompt]()
        with job.processes.shared_errors():
            if job.processes.first:  # which writes
                asked = prompts(
                    job.data,
                    state.text,
                    tokenizer,
                    text.validation_tokens_NT,
                    count=self.answers,
                    longest=self.prompt_tokens,
                    name=job.name,
                )
        written, other = Written(settings, job, tokenizer, asked, text), self._off_policy_loss(job.name)
        state = settings.train(
            job,
            state,
            text,
            steps=self.steps,
            rows=written.by,
            loss_of=lambda step: other if self.reads_text(step) else None,
            figures=written.figures,
        )
        return replace(state, answers={**state.answers, job.name: written.summary()})

    def _off_policy_loss(self, name: str) -> Loss:
        plugin, where = self.off_policy_loss, f"{name}.off_policy_loss {self.off_policy_loss.name}"
        cls = LOSSES.get(plugin.name)
        options = plugin.options(cls.Config, where)
        if getattr(options, "confidence", 0.0) is None:
            raise UPQError(f"{where}: needs a confidence here, as in {{name: {plugin.name}, confidence: 0.5}}")
        return cls(options)

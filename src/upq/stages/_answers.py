"""Rows that a student writes while it is trained.

Shape suffixes: N = answers, B = rows of a step, T = tokens in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.core.scramble import scramble
from upq.data.conversations import ChatTemplate
from upq.data.generated import continued, unless_end
from upq.data.prompts import Prompt
from upq.data.tokens import TokenSet, permutation
from upq.decoding import Unsuitable, batch
from upq.distill.student import frozen
from upq.evals.items import loops
from upq.files.tensors import keys_required, load_tensors, save_tensors
from upq.kernels import computing
from upq.model.loading import generation_config
from upq.stages._base import Job
from upq.text.generation import Over, Request, Sampling, end_tokens

if TYPE_CHECKING:
    from upq.stages.on_policy import OnPolicy


@dataclass(frozen=True, slots=True)
class Round:
    """Answers behind their prompts, one text after the other."""

    tokens: Tensor  # int32
    prompts: Tensor  # (N,) tokens of each prompt
    answers: Tensor  # (N,) tokens of each answer, at least one
    at_limit: Tensor  # (N,) uint8: without an end
    loops: Tensor  # (N,) uint8

    @classmethod
    def of(cls, texts: Sequence[tuple[Prompt, list[int], bool, bool]]) -> Self:
        return cls(
            torch.tensor([token for prompt, answer, *_ in texts for token in (*prompt, *answer)], dtype=torch.int32),
            torch.tensor([len(prompt) for prompt, *_ in texts], dtype=torch.int32),
            torch.tensor([len(answer) for _, answer, *_ in texts], dtype=torch.int32),
            torch.tensor([cut for *_, cut, _ in texts], dtype=torch.uint8),
            torch.tensor([loop for *_, loop in texts], dtype=torch.uint8),
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        tensors, _ = load_tensors(path)
        with keys_required(path):
            return cls(**{field.name: tensors[field.name] for field in fields(cls)})

    def write(self, path: Path) -> None:
        save_tensors(path, {field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def lengths(self) -> Tensor:
        return self.prompts + self.answers

    def batch(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Tokens and targets (B, T) of some texts, zeros behind the shorter ones."""
        ends = self.lengths.cumsum(0)
        texts = [
            self.tokens[end - length : end].long() for end, length in zip(ends[rows], self.lengths[rows], strict=True)
        ]
        tokens_BT = pad_sequence(texts, batch_first=True)
        place_T = torch.arange(tokens_BT.shape[1])
        mask_BT = (place_T >= self.prompts[rows, None]) & (place_T < self.lengths[rows, None])
        return tokens_BT, mask_BT


class Written:
    """Training rows that the student writes: a round for each `refresh` steps, kept in a file.

    A round is a function of the student as its first step finds it, so a resumed training may read what is there.
    """

    def __init__(
        self,
        stage: OnPolicy,
        job: Job,
        tokenizer: PreTrainedTokenizerBase,
        asked: Sequence[Prompt],
        text: TokenSet,
    ) -> None:
        """`asked` are the prompts, in the process that writes."""
        self._stage, self._job, self._tokenizer, self._asked, self._text = stage, job, tokenizer, asked, text
        self._student: PreTrainedModel | None = None
        self._rounds = dict[int, Round]()  # small: 4 bytes a token
        self._said = False

    def by(self, student: PreTrainedModel) -> Self:
        """The rows that this student writes from here on."""
        self._student = student
        return self

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        if self._stage.reads_text(step):
            return self._text.batch(self._stage.steps_off(step), size)
        return self._round(step // self._stage.refresh).batch(self._places(step))

    def rows(self, step: int, size: int) -> Tensor:
        return torch.arange(step * size, (step + 1) * size)  # no text comes twice

    def figures(self, step: int) -> dict[str, float]:
        """Tokens of all rows up to this step and, of a step on answers, the shares that were cut and that loop."""
        stage, last = self._stage, step // self._stage.refresh
        tokens = stage.steps_off(step + 1) * stage.batch_size * self._job.reading.seq_len
        tokens += sum(int(self._round(number).lengths.sum()) for number in range(last) if self._of(number))
        places = self._places(step)
        if self._of(last):
            tokens += int(self._round(last).lengths[: places.stop].sum())
        return {"tokens": tokens} | ({} if stage.reads_text(step) else _shares(self._round(last), places))

    def summary(self) -> dict[str, float]:
        """Of all rounds, and shares of the last one."""
        found = [
            self._round(number) for number in range(-(-self._stage.steps // self._stage.refresh)) if self._of(number)
        ]
        every = Round(*(torch.cat([getattr(each, field.name) for each in found]) for field in fields(Round)))
        last = {f"{name}_last": share for name, share in _shares(found[-1]).items()}
        return {"written": len(every.answers), "tokens": float(every.answers.float().mean()), **_shares(every), **last}

    def _before(self, step: int) -> int:
        """Answers that the steps before this one read."""
        step = min(step, self._stage.steps)
        return (step - self._stage.steps_off(step)) * self._stage.batch_size

    def _of(self, number: int) -> range:
        """The answers of a round, by their place among all. None where all of its steps read text."""
        refresh = self._stage.refresh
        return range(self._before(number * refresh), self._before((number + 1) * refresh))

    def _places(self, step: int) -> slice:
        """The answers of a step in its round."""
        first = self._of(step // self._stage.refresh).start
        return slice(self._before(step) - first, self._before(step + 1) - first)

    def _round(self, number: int) -> Round:
        if number not in self._rounds:
            path, processes = self._job.folder / "answers" / f"{number:06}.safetensors", self._job.processes
            if processes.of_first(not path.is_file()):
                self._write(number, path)
            with processes.shared_errors():
                self._rounds[number] = Round.read(path)
        return self._rounds[number]

    def _write(self, number: int, path: Path) -> None:
        """The first process writes. Dense, the student's weights take what their gradients take in a step."""
        assert self._student is not None
        processes = self._job.processes
        model = frozen(self._student, keep=processes.first)
        with processes.shared_errors():
            if processes.first:
                model.generation_config = generation_config(self._job.model)
                path.parent.mkdir(parents=True, exist_ok=True)
                Round.of(self._answered(model, self._of(number))).write(path)

    def _answered(self, model: PreTrainedModel, numbers: range) -> list[tuple[Prompt, list[int], bool, bool]]:
        stage, tokenizer, asked = self._stage, self._tokenizer, self._asked
        ends = end_tokens(model.generation_config, tokenizer)
        ending = ChatTemplate(tokenizer).end_of_turn.strip() if tokenizer.chat_template else ""
        ending = unless_end(tokenizer, ending, ends)
        over = Over(tokenizer, frozenset(ends), (ending,) if ending else ())
        requests = []
        for number in numbers:
            epoch, place = divmod(number, len(asked))
            prompt = asked[int(permutation(len(asked), self._job.seed, epoch)[place])]
            seed = int(scramble(np.array([number], np.uint64), self._job.seed)[0])
            requests.append(Request(number, prompt, stage.max_new_tokens, over, Sampling(stage.temperature, seed)))
        written, found = self._texts(model, requests, ends, ending), []
        for request in requests:
            answer = written[request.key]
            text = str(tokenizer.decode(answer, skip_special_tokens=True))
            found.append((request.ids, answer, not over(answer), loops(text)))
        return found

    def _texts(
        self, model: PreTrainedModel, requests: Sequence[Request[int]], ends: list[int], ending: str
    ) -> dict[int, list[int]]:
        """By the compiled decoder where it takes the model, with activations as they are in the training."""
        size, tokenizer = self._stage.written_at_once, self._tokenizer
        try:
            with computing("reference"):
                return dict(batch(model, size=size).write(requests))
        except Unsuitable as reason:
            if not self._said:
                self._job.progress.note(f"{self._job.name}: transformers writes, not the compiled decoder: {reason}")
                self._said = True
        found = dict[int, list[int]]()
        for first in range(0, len(requests), size):
            some = requests[first : first + size]
            prompts, samplings = [list(request.ids) for request in some], [request.sampling for request in some]
            texts = continued(model, tokenizer, prompts, samplings, self._stage.max_new_tokens, ends, ending)
            for request, ids in zip(some, texts, strict=True):
                end = next((n for n in range(1, len(ids)) if request.over(ids[:n])), len(ids))
                found[request.key] = ids[:end]
        return found


def _shares(found: Round, places: slice = slice(None)) -> dict[str, float]:
    """Of some answers."""
    return {name: float(getattr(found, name)[places].float().mean()) for name in ("at_limit", "loops")}

"""Conversations that the original model writes itself, both sides: instruction text without any data set.

The model is given the chat template up to where the user's words begin and goes on from there, then answers itself
(Magpie, arXiv 2406.08464). With questions, it answers these alone. Sampling is from the model's own distribution
(LLM-QAT, arXiv 2305.17888), of answers too unless the recipe asks for the likeliest ones.

Where the compiled decoder takes the model, conversations are written side by side: one that ends leaves, and one of the
next batch takes its place. Else a batch is written by transformers until its longest text ends.

Shape suffixes: B = samples of a batch, T = tokens.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from upq.core.errors import UPQError
from upq.core.processes import ALONE, Processes
from upq.core.progress import Progress
from upq.core.scramble import scramble
from upq.data.config import Generated
from upq.data.conversations import ChatTemplate
from upq.data.rows import CUT, Message
from upq.data.tokens import permutation
from upq.files.atomic import atomic_write, write_errors
from upq.text.generation import Chosen, Over, Request, Sampling, end_tokens, own_distribution, written
from upq.text.tokenizer import check_tokens

_MARK = "\ue000"  # private use: occurs in no template
_WITHOUT = "leave them out with --set data.generated=null"
_EMPTY_IN_A_ROW = 8  # batches without a single finished conversation, after which the model is given up
_CALLS = 2  # of the model for a batch: prompts, then answers

Conversation = list[dict[str, Any]]


class Words(NamedTuple):
    """What a model has written, and whether it ended it."""

    text: str
    ended: bool


class Texts(Protocol):
    """Texts that are written side by side (`upq.decoding.Batch`)."""

    @property
    def free(self) -> int:
        """Texts that can be added."""

    def add(self, request: Request[Any]) -> None: ...

    def step(self) -> Iterable[tuple[Any, list[int]]]:
        """A token for each; those that end."""


def write_conversations(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    section: Generated,
    *,
    seed: int,
    progress: Progress,
    processes: Processes = ALONE,
    sharded: bool = False,
    texts: Texts | None = None,
    questions: Sequence[Conversation] = (),
) -> Path:
    """Conversations of one turn in `folder`, a file of JSON lines for each batch, of `section.tokens` tokens in all.

    Law (tests/test_data_generated.py): the files are byte for byte those of one process that was never interrupted,
    for any number of processes, whatever files are there already. Each conversation has a seed of its own.

    Process r writes batches r, r + world, …; sizes are exchanged each round, so all processes stop after the same one.
    `texts`: what writes; None for transformers. `sharded`: each process holds a part of `model`. `progress` advances by
    tokens. `questions`: to answer, in an order of their own each time they begin again; without them, the model asks
    too. Raises UPQError, in all processes, where the model has no chat template or ends no answer.
    """
    assert section.tokens is not None
    with processes.shared_errors(), write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sampler = _Sampler(model, tokenizer, section.max_new_tokens, processes if sharded else ALONE)
    talks: Callable[[int], Iterable[Conversation]] = partial(
        _conversations, sampler, tokenizer, section, seed, questions
    )
    if texts is not None:
        ends = end_tokens(model.generation_config, tokenizer)
        mine = (number for number in count(processes.rank, processes.world) if not _file(folder, number).is_file())
        talks = _Stream(texts, tokenizer, section, frozenset(ends), seed, mine, questions)
    done = number = empty = 0
    needed: list[Path] = []  # a batch without a finished conversation has no file: the data would not have an empty one
    while done < section.tokens:
        with processes.shared_errors():
            written = _write_batch(folder, number + processes.rank, sampler, tokenizer, talks)
        for size in processes.each(written):
            if size:
                needed.append(_file(folder, number))
            empty = 0 if size else empty + 1
            if empty == _EMPTY_IN_A_ROW:
                raise UPQError(
                    "data.generated: the model ends none of its answers within"
                    f" {section.max_new_tokens} tokens; raise data.generated.max_new_tokens or leave data.generated out"
                )
            progress.advance(min(size, section.tokens - done))
            done, number = done + size, number + 1
            if done >= section.tokens:
                break
    with processes.shared_errors():
        # Machines that see different files would train on different data.
        if not all(file.is_file() for file in needed):
            raise UPQError(
                f"{folder}: conversations that another process wrote are not to be seen here;"
                " under torchrun, --out must lie on a file system that all machines share"
            )
    with processes.shared_errors(), write_errors(folder):
        if processes.first:
            for file in set(folder.glob("*.jsonl")).difference(needed):
                file.unlink()
    return folder


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.jsonl"


class _Sampler:
    """`sample` with a run's settings. It counts calls: a sharded model runs only when all processes call it."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, company: Processes
    ) -> None:
        self._model, self._tokenizer, self._company = model, tokenizer, company
        self._max_new_tokens, self._calls = max_new_tokens, 0

    def __call__(self, prompts: list[list[int]], samplings: list[Sampling], *, closing: str = "") -> list[Words]:
        self._calls += 1
        model, tokenizer, limit = self._model, self._tokenizer, self._max_new_tokens
        return sample(model, tokenizer, prompts, samplings, limit, closing=closing, company=self._company)

    def pad_calls(self, calls: int) -> None:
        """Call without prompts until there have been `calls` since the last time."""
        while self._calls < calls:
            self([], [])
        self._calls = 0


def _write_batch(
    folder: Path,
    number: int,
    sampler: _Sampler,
    tokenizer: PreTrainedTokenizerBase,
    talks: Callable[[int], Iterable[Conversation]],
) -> int:
    """Tokens in the batch's file, which is written unless it is there."""
    path = _file(folder, number)
    try:
        if not path.is_file() and (text := "".join(json.dumps({"messages": talk}) + "\n" for talk in talks(number))):
            atomic_write(path, text)
    except UPQError:
        sampler.pad_calls(_CALLS)
        raise
    sampler.pad_calls(_CALLS)
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum(len(_tokens(tokenizer, json.loads(line)["messages"])) for line in lines)


def _conversations(
    sampler: _Sampler,
    tokenizer: PreTrainedTokenizerBase,
    section: Generated,
    seed: int,
    questions: Sequence[Conversation],
    number: int,
) -> Iterator[Conversation]:
    """One batch by transformers. A prompt that was cut off is left out, an answer as `_answered` says."""
    frame, batch = Frame.of(tokenizer), range(section.batch_size)
    asking, answering = zip(*(_samplings(section, seed, number, i) for i in batch), strict=True)
    turns: list[Conversation]
    if questions:
        turns = [_question(questions, section, seed, number, i) for i in batch]
    else:
        asked = sampler([_header(tokenizer, frame)] * section.batch_size, list(asking), closing=frame.closing)
        turns = [[{"role": "user", "content": prompt.text}] if prompt.ended and prompt.text else [] for prompt in asked]
    how = [sampling for sampling, turn in zip(answering, turns, strict=True) if turn]
    turns = [turn for turn in turns if turn]
    answers = sampler([_tokens(tokenizer, turn, prompt=True) for turn in turns], how, closing=frame.ending)
    for turn, answer in zip(turns, answers, strict=True):
        if talk := _answered(turn, answer, section):
            yield talk


def _answered(turn: Conversation, answer: Words, section: Generated) -> Conversation:
    """The conversation with its answer; empty without one. An answer that was cut off is left out, or says that it is.

    Without that, the template would end it where the model did not.
    """
    if not answer.text or not (answer.ended or section.cut == "keep"):
        return []
    return [*turn, {"role": "assistant", "content": answer.text} | ({} if answer.ended else {CUT: True})]


def _question(questions: Sequence[Conversation], section: Generated, seed: int, number: int, i: int) -> Conversation:
    """That of conversation `i` of a batch."""
    epoch, place = divmod(number * section.batch_size + i, len(questions))
    return questions[int(permutation(len(questions), seed, epoch)[place])]


def _samplings(section: Generated, seed: int, number: int, i: int) -> tuple[Sampling, Sampling]:
    """Of the prompt and of the answer of conversation `i` of a batch."""
    place = 2 * (number * section.batch_size + i)
    asking, answering = scramble(np.array([place, place + 1], np.uint64), seed).tolist()
    return Sampling(section.temperature, asking), Sampling(section.answer_temperature, answering)


def _header(tokenizer: PreTrainedTokenizerBase, frame: Frame) -> list[int]:
    ids: list[int] = tokenizer(frame.header, add_special_tokens=False)["input_ids"]
    return ids


@dataclass(slots=True)
class _Open:
    """A batch that is being written: its conversations, or errors, by number."""

    left: int
    talks: dict[int, Conversation] = field(default_factory=dict)
    errors: dict[int, UPQError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Turn:
    """Which text of which conversation."""

    batch: int
    i: int
    asked: tuple[dict[str, str], ...] = ()  # the question, where this is its answer


class _Stream:
    """The conversations of batch after batch. Where texts are free, conversations of later batches begin."""

    def __init__(
        self,
        texts: Texts,
        tokenizer: PreTrainedTokenizerBase,
        section: Generated,
        ends: frozenset[int],
        seed: int,
        numbers: Iterator[int],
        questions: Sequence[Conversation],
    ) -> None:
        """`numbers`: of the batches to write, in order."""
        self._texts, self._tokenizer, self._section, self._seed = texts, tokenizer, section, seed
        self._questions = questions
        self._frame, self._ends = Frame.of(tokenizer), ends
        self._closing = unless_end(tokenizer, self._frame.closing, ends)
        self._ending = unless_end(tokenizer, self._frame.ending, ends)
        self._answers = deque[Request[_Turn]]()
        self._open = dict[int, _Open]()
        self._prompts = self._all_prompts(numbers)

    def __call__(self, number: int) -> list[Conversation]:
        """All of a batch, in order. Raises the first of its errors."""
        while number not in self._open or self._open[number].left:
            while self._texts.free:
                self._texts.add(self._answers.popleft() if self._answers else next(self._prompts))
            for turn, ids in self._texts.step():
                self._ended(turn, ids)
        done = self._open.pop(number)
        if done.errors:
            raise done.errors[min(done.errors)]
        return [talk for _, talk in sorted(done.talks.items())]

    def _all_prompts(self, numbers: Iterator[int]) -> Iterator[Request[_Turn]]:
        header = _header(self._tokenizer, self._frame)
        for number in numbers:
            self._open[number] = _Open(self._section.batch_size)
            for i in range(self._section.batch_size):
                if self._questions:
                    yield self._answer(number, i, _question(self._questions, self._section, self._seed, number, i))
                else:
                    yield self._request(_Turn(number, i), header, self._closing)

    def _answer(self, number: int, i: int, asked: Conversation) -> Request[_Turn]:
        ids = _tokens(self._tokenizer, asked, prompt=True)
        return self._request(_Turn(number, i, tuple(asked)), ids, self._ending)

    def _request(self, turn: _Turn, ids: list[int], closing: str) -> Request[_Turn]:
        asking, answering = _samplings(self._section, self._seed, turn.batch, turn.i)
        over = Over(self._tokenizer, self._ends, (closing,) if closing else ())
        sampling = answering if turn.asked else asking
        return Request(turn, tuple(ids), self._section.max_new_tokens, over, sampling)

    def _ended(self, turn: _Turn, ids: list[int]) -> None:
        """A prompt gets its answer. One that was cut off, or cannot be a conversation, ends it."""
        batch = self._open[turn.batch]
        closing = self._ending if turn.asked else self._closing
        try:
            words = _words(self._tokenizer, ids, set(self._ends), closing)
            if words.text and words.ended and not turn.asked:
                self._answers.append(self._answer(turn.batch, turn.i, [{"role": "user", "content": words.text}]))
                return
        except UPQError as error:
            batch.errors[turn.i] = error
            words = Words("", ended=False)
        batch.left -= 1
        if turn.asked and (talk := _answered([*turn.asked], words, self._section)):
            batch.talks[turn.i] = talk


@dataclass(frozen=True)
class Frame:
    """What a template writes around the words of a user and of the assistant.

    What ends a turn is the first line of what stands behind its words, empty where nothing does.
    """

    header: str  # before the user's words
    closing: str  # ends them: [/INST], <|im_end|>
    ending: str  # ends the assistant's words, where no end token has: </s>, <|im_end|>

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """Raises UPQError where no conversation can begin with it."""
        if not tokenizer.chat_template:
            raise UPQError(
                "data.generated: the model's tokenizer has no chat template, so it cannot write conversations;"
                f" {_WITHOUT}"
            )
        template, asked = ChatTemplate(tokenizer), Message("user", _MARK)
        header, found, behind = template.render((asked,), "data.generated", prompt=True).partition(_MARK)
        if not found:
            raise UPQError(f"data.generated: the chat template leaves out the user's words; {_WITHOUT}")
        if not tokenizer(header, add_special_tokens=False)["input_ids"]:
            raise UPQError(
                "data.generated: the chat template writes nothing before the user's words, so the model has nothing to"
                f" go on from; {_WITHOUT}"
            )
        talk = (Message("user", "a"), Message("assistant", _MARK))
        return cls(
            header, _first_line(behind), _first_line(template.render(talk, "data.generated").partition(_MARK)[2])
        )


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "").strip()


def check(tokenizer: PreTrainedTokenizerBase, ends: list[int], rows: int) -> None:
    """Every fault that shows without a model. `ends`: the ids that end an answer; `rows`: of the embedding.

    Raises UPQError.
    """
    Frame.of(tokenizer)
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for ids in (_tokens(tokenizer, [asked], prompt=True), _tokens(tokenizer, [asked, answered])):
        check_tokens(tokenizer, ids, rows, "data.generated: the chat template")
    if not ends:
        raise UPQError(
            "data.generated: the model has no end token, neither in its tokenizer nor in generation_config.json, so it"
            f" ends no answer; {_WITHOUT}"
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, talk: Conversation, *, prompt: bool = False) -> list[int]:
    messages = tuple(Message(turn["role"], turn["content"], {CUT: True} if turn.get(CUT) else {}) for turn in talk)
    text = ChatTemplate(tokenizer).render(messages, "data.generated", prompt=prompt)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    samplings: list[Sampling],
    max_new_tokens: int,
    *,
    closing: str = "",
    company: Processes = ALONE,
) -> list[Words]:
    """What the model writes after each prompt, up to an end token or to `max_new_tokens`.

    `closing`: a text that ends what is written as an end token does. `company` are those that hold a part of the model
    each: all of them have to call, and run it as often as the one that writes longest, on a single token where they
    have no prompts.
    """
    if not any(company.each(len(prompts))):
        return []
    ends = end_tokens(model.generation_config, tokenizer)
    closing = unless_end(tokenizer, closing, ends)
    asked = prompts or [[tokenizer.pad_token_id or 0]]
    limit = max_new_tokens if prompts else 1
    found = continued(
        model, tokenizer, asked, samplings or [Sampling()], limit, ends, closing, together=company.world > 1
    )
    return [_words(tokenizer, ids, set(ends), closing) for ids in found[: len(prompts)]]


@torch.inference_mode()
def continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    samplings: list[Sampling],
    max_new_tokens: int,
    ends: list[int],
    closing: str = "",
    *,
    together: bool = False,
) -> list[list[int]]:
    """The ids that transformers writes after each prompt, all to one length: the end of some is followed by padding.

    `closing` ends a text beside the `ends`. `together`: other processes hold a part of the model.
    """
    settings = own_distribution(ends, tokenizer, max_new_tokens=max_new_tokens)
    closed = [_Closed(tokenizer, closing, max(map(len, prompts)))] if closing else []
    return written(
        model,
        prompts,
        settings,
        synced_gpus=together,
        stopping_criteria=StoppingCriteriaList(closed),
        logits_processor=LogitsProcessorList([Chosen(samplings)]),
    )


def unless_end(tokenizer: PreTrainedTokenizerBase, closing: str, ends: Container[int]) -> str:
    """What ends a text as an end token does; empty where it is one."""
    return "" if closing and tokenizer.convert_tokens_to_ids(closing) in ends else closing


class _Closed(StoppingCriteria):
    """Ends each row that has written `closing` behind its first `width` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, closing: str, width: int) -> None:
        self._over, self._width = Over(tokenizer, frozenset(), (closing,)), width

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        closed = [self._over.stopped(ids) for ids in input_ids[:, self._width :].tolist()]
        return torch.tensor(closed, device=input_ids.device)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _words(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: set[int], closing: str) -> Words:
    length = next((i for i, token in enumerate(ids) if token in ends), None)
    ids, finished = ids[:length], length is not None
    if closing and closing in _text(tokenizer, ids):
        closed = bisect_left(range(len(ids)), True, key=lambda n: closing in _text(tokenizer, ids[:n]))
        ids, finished = ids[:closed], True
    words = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Words((words.partition(closing)[0] if closing else words).strip(), finished)

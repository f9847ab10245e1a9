"""Conversations that the original model writes itself, both sides: instruction text without any data set.

The model is given the chat template up to where the user's words begin and goes on from there, then answers itself
(Magpie, arXiv 2406.08464). Sampling is from the model's own distribution (LLM-QAT, arXiv 2305.17888), of answers too
unless the recipe asks for the likeliest ones.

Shape suffixes: B = samples of a batch, T = tokens.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from upq.core.errors import UPQError
from upq.core.processes import ALONE, Processes
from upq.core.progress import Progress
from upq.data.config import Generated
from upq.data.conversations import ChatTemplate
from upq.data.rows import Message
from upq.files.atomic import atomic_write, write_errors
from upq.text.generation import end_tokens, own_distribution, written
from upq.text.tokenizer import check_tokens

_MARK = "\ue000"  # private use: occurs in no template
_WITHOUT = "leave them out with --set data.generated=null"
_EMPTY_IN_A_ROW = 8  # batches without a single finished conversation, after which the model is given up
_CALLS = 2  # of the model for a batch: prompts, then answers

Conversation = list[dict[str, str]]


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
) -> Path:
    """Conversations of one turn in `folder`, a file of JSON lines for each batch, of `section.tokens` tokens in all.

    Law (tests/test_data_generated.py): the files are byte for byte those of one process that was never interrupted,
    for any number of processes, whatever files are there already. Each batch has a seed of its own.

    Process r writes batches r, r + world, …; sizes are exchanged each round, so all processes stop after the same one.
    `sharded`: each process holds a part of `model`. `progress` advances by tokens. Raises UPQError, in all processes,
    where the model has no chat template or ends no answer.
    """
    assert section.tokens is not None
    with processes.shared_errors(), write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sampler = _Sampler(model, tokenizer, section.max_new_tokens, processes if sharded else ALONE)
    done = number = empty = 0
    needed: list[Path] = []  # a batch without a finished conversation has no file: the data would not have an empty one
    while done < section.tokens:
        mine = number + processes.rank
        with processes.shared_errors():
            written = _write_batch(_file(folder, mine), sampler, tokenizer, section, seed=seed * 1_000_003 + mine)
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

    def __call__(self, prompts: list[list[int]], temperature: float, *, closing: str = "") -> list[str]:
        self._calls += 1
        return sample(
            self._model,
            self._tokenizer,
            prompts,
            self._max_new_tokens,
            temperature,
            closing=closing,
            company=self._company,
        )

    def pad_calls(self, calls: int) -> None:
        """Call without prompts until there have been `calls` since the last time."""
        while self._calls < calls:
            self([], 1.0)
        self._calls = 0


def _write_batch(
    path: Path, sampler: _Sampler, tokenizer: PreTrainedTokenizerBase, section: Generated, *, seed: int
) -> int:
    """Tokens in the batch's file, which is written unless it is there."""
    try:
        if not path.is_file():
            torch.manual_seed(seed)
            talks = _conversations(sampler, tokenizer, section)
            if text := "".join(json.dumps({"messages": talk}) + "\n" for talk in talks):
                atomic_write(path, text)
    except UPQError:
        sampler.pad_calls(_CALLS)
        raise
    sampler.pad_calls(_CALLS)
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum(len(_tokens(tokenizer, json.loads(line)["messages"])) for line in lines)


def _conversations(sampler: _Sampler, tokenizer: PreTrainedTokenizerBase, section: Generated) -> Iterator[Conversation]:
    """One batch. What was cut off at the limit is left out: the template would end it where the model did not."""
    frame = Frame.of(tokenizer)
    header_ids = tokenizer(frame.header, add_special_tokens=False)["input_ids"]
    asked = sampler([header_ids] * section.batch_size, section.temperature, closing=frame.closing)
    turns = [[{"role": "user", "content": prompt}] for prompt in asked if prompt]
    prompts = [_tokens(tokenizer, turn, prompt=True) for turn in turns]
    answers = sampler(prompts, section.answer_temperature, closing=frame.ending)
    for turn, answer in zip(turns, answers, strict=True):
        if answer:
            yield [*turn, {"role": "assistant", "content": answer}]


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
    messages = tuple(Message(turn["role"], turn["content"]) for turn in talk)
    text = ChatTemplate(tokenizer).render(messages, "data.generated", prompt=prompt)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    *,
    closing: str = "",
    company: Processes = ALONE,
) -> list[str]:
    """What the model writes after each prompt up to an end token; empty where none came within `max_new_tokens`.

    At temperature 0 the likeliest token each time. `closing`: a text that ends what is written as an end token does.
    `company` are those that hold a part of the model each: all of them have to call, and run it as often as the one
    that writes longest, on a single token where they have no prompts.
    """
    if not any(company.each(len(prompts))):
        return []
    ends = end_tokens(model.generation_config, tokenizer)
    if closing and tokenizer.convert_tokens_to_ids(closing) in ends:
        closing = ""
    settings = own_distribution(
        ends, tokenizer, max_new_tokens=max_new_tokens if prompts else 1, temperature=temperature
    )
    asked = prompts or [[cast(int, settings.pad_token_id)]]
    closed = [_Closed(tokenizer, closing, max(map(len, asked)))] if closing else []
    found = written(
        model,
        asked,
        settings,
        synced_gpus=company.world > 1,
        stopping_criteria=StoppingCriteriaList(closed),
    )
    return [_finished(tokenizer, ids, set(ends), closing) for ids in found[: len(prompts)]]


class _Closed(StoppingCriteria):
    """Ends each row that has written `closing` behind its first `width` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, closing: str, width: int) -> None:
        self._tokenizer, self._closing, self._width = tokenizer, closing, width
        self._longest = len(closing.encode()) + 1  # a token has a byte or more; one may begin before the text

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        last_BT = input_ids[:, max(self._width, input_ids.shape[1] - self._longest) :]
        closed = [self._closing in _text(self._tokenizer, ids) for ids in last_BT.tolist()]
        return torch.tensor(closed, device=input_ids.device)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _finished(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: set[int], closing: str) -> str:
    length = next((i for i, token in enumerate(ids) if token in ends), None)
    ids, finished = ids[:length], length is not None
    if closing and closing in _text(tokenizer, ids):
        closed = bisect_left(range(len(ids)), True, key=lambda n: closing in _text(tokenizer, ids[:n]))
        ids, finished = ids[:closed], True
    if not finished:
        return ""
    words = str(tokenizer.decode(ids, skip_special_tokens=True))
    return (words.partition(closing)[0] if closing else words).strip()

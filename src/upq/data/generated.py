"""Conversations that the original model writes itself, both sides: instruction text without any data set.

The model is given the chat template up to where the user's words begin and goes on from there, then answers itself
(Magpie, arXiv 2406.08464). Sampling is from the model's own distribution (LLM-QAT, arXiv 2305.17888), of answers too
unless the recipe asks for the likeliest ones.

Shape suffixes: B = samples of a batch, T = tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.core.errors import UPQError
from upq.core.processes import ALONE, Processes
from upq.core.progress import Progress
from upq.data.config import Generated
from upq.data.conversations import refusals
from upq.files.atomic import atomic_write, write_errors

_MARK = "\ue000"  # private use: occurs in no template
_PATIENCE = 8  # batches in a row without a single finished conversation

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

    Batches that are there already stay: each has a seed of its own, so an interrupted run ends in the same files.
    `progress` advances by tokens. Raises UPQError where the model has no chat template or ends no answer.

    Several processes make a batch each at the same time, then write them one after the other, up to the one that
    completes the tokens. So files, errors and progress are those of a single process, whenever a run ends. `sharded`:
    each holds a part of `model`, which they run together.
    """
    assert section.tokens is not None
    with processes.shared_errors(), write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    done = number = empty = 0
    files = []
    while done < section.tokens:
        mine = number + processes.rank
        voice = _Voice(model, tokenizer, section, processes if sharded else ALONE)
        batch = _batch(_file(folder, mine), voice, tokenizer, section, seed=seed * 1_000_003 + mine)
        for rank, size in enumerate(processes.each(batch.size)):
            with processes.shared_errors():
                if rank == processes.rank:
                    batch.keep()
            if size:
                files.append(_file(folder, number))
            empty = 0 if size else empty + 1
            if empty == _PATIENCE:
                raise UPQError(
                    "data.generated: the model ends none of its answers within"
                    f" {section.max_new_tokens} tokens; raise data.generated.max_new_tokens or leave data.generated out"
                )
            progress.advance(min(size, section.tokens - done))
            done, number = done + size, number + 1
            if done >= section.tokens:
                break  # what the processes after this one have made is too much
    with processes.shared_errors():
        # Machines that see different files would train on different data.
        if not all(file.is_file() for file in files):
            raise UPQError(
                f"{folder}: conversations that another process wrote are not to be seen here;"
                " under torchrun, --out must lie on a file system that all machines share"
            )
    return folder


@dataclass(frozen=True, slots=True)
class _Batch:
    """A file of conversations that may have to be written yet, or why there is none.

    Without a conversation there is no file: the data would not have an empty one.
    """

    path: Path
    text: str = ""
    size: int = 0  # in tokens
    error: UPQError | None = None

    def keep(self) -> None:
        if self.error is not None:
            raise self.error
        if self.text and not self.path.is_file():
            atomic_write(self.path, self.text)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.jsonl"


class _Voice:
    """What the model writes for a batch: the user's words, then the answers.

    Processes that share a model ask it together. So each asks as often as the others, with prompts or without: `rest`
    makes up for what was not asked for a batch that was there already, or that failed.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: Generated, company: Processes
    ) -> None:
        self._model, self._tokenizer, self._company = model, tokenizer, company
        self._limit, self._left = section.max_new_tokens, 2

    def __call__(self, prompts: list[list[int]], temperature: float) -> list[str]:
        self._left -= 1
        return sample(self._model, self._tokenizer, prompts, self._limit, temperature, company=self._company)

    def rest(self) -> None:
        while self._left:
            self([], 1.0)


def _batch(path: Path, voice: _Voice, tokenizer: PreTrainedTokenizerBase, section: Generated, *, seed: int) -> _Batch:
    """From `path` where it is there. An error is kept for the batch's turn, which may not come."""
    try:
        if path.is_file():
            text = path.read_text()
        else:
            torch.manual_seed(seed)
            talks = _conversations(voice, tokenizer, section)
            text = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks)
        size = sum(len(_tokens(tokenizer, json.loads(line)["messages"])) for line in text.splitlines())
        batch = _Batch(path, text, size)
    except UPQError as error:
        batch = _Batch(path, error=error)
    voice.rest()
    return batch


def _conversations(voice: _Voice, tokenizer: PreTrainedTokenizerBase, section: Generated) -> Iterator[Conversation]:
    """One batch. What was cut off at the limit is left out: the template would end it where the model did not."""
    header_ids = tokenizer(_header(tokenizer), add_special_tokens=False)["input_ids"]
    asked = voice([header_ids] * section.batch_size, section.temperature)
    turns = [[{"role": "user", "content": prompt}] for prompt in asked if prompt]
    prompts = [_tokens(tokenizer, turn, prompt=True) for turn in turns]
    answers = voice(prompts, section.answer_temperature)
    for turn, answer in zip(turns, answers, strict=True):
        if answer:
            yield [*turn, {"role": "assistant", "content": answer}]


def _header(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes before the user's words."""
    if not tokenizer.chat_template:
        raise UPQError(
            "data.generated: the model's tokenizer has no chat template, so it cannot write conversations;"
            " leave them out with --set data.generated=null"
        )
    with refusals("data.generated"):
        text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    assert isinstance(text, str)
    return text.split(_MARK)[0]


def _tokens(tokenizer: PreTrainedTokenizerBase, talk: Conversation, *, prompt: bool = False) -> list[int]:
    with refusals("data.generated"):
        rendered: Any = tokenizer.apply_chat_template(talk, add_generation_prompt=prompt, return_dict=True)
    ids: list[int] = rendered["input_ids"]
    return ids


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    *,
    company: Processes = ALONE,
) -> list[str]:
    """What the model writes after each prompt up to an end token; empty where none came within `max_new_tokens`.

    At temperature 0 the likeliest token each time. `company` are those that hold a part of the model each: all of them
    have to call, and run it as often as the one that writes longest, on a single token where they have no prompts.
    """
    if not any(company.each(len(prompts))):
        return []
    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    asked = prompts or [[pad]]
    width = max(map(len, asked))
    rows_BT = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in asked], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked], device=model.device)
    how: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature:
        how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    generate: Any = model.generate
    written_BT: Tensor = generate(
        rows_BT,
        attention_mask=mask_BT,
        **how,
        max_new_tokens=max_new_tokens if prompts else 1,
        synced_gpus=company.world > 1,
        prefill_chunk_size=None,  # of the model's own settings: as many passes for a prompt of any width
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    return [_finished(tokenizer, ids, ends) for ids in written_BT[: len(prompts), width:].tolist()]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    found = model.generation_config.eos_token_id if model.generation_config else None
    ends = {found} if isinstance(found, int) else set(found or ())
    return ends | ({tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set())


def _finished(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: set[int]) -> str:
    length = next((i for i, token in enumerate(ids) if token in ends), None)
    return "" if length is None else str(tokenizer.decode(ids[:length], skip_special_tokens=True)).strip()

"""Conversations that the original model writes itself, both sides: instruction text without any data set.

The model is given the chat template up to where the user's words begin and goes on from there, then answers itself
(Magpie, arXiv 2406.08464). Sampling is from the model's own distribution (LLM-QAT, arXiv 2305.17888), of answers too
unless the recipe asks for the likeliest ones.

Shape suffixes: B = samples of a batch, T = tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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

    def __call__(self, prompts: list[list[int]], temperature: float) -> list[str]:
        self._calls += 1
        return sample(self._model, self._tokenizer, prompts, self._max_new_tokens, temperature, company=self._company)

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
    header_ids = tokenizer(_header(tokenizer), add_special_tokens=False)["input_ids"]
    asked = sampler([header_ids] * section.batch_size, section.temperature)
    turns = [[{"role": "user", "content": prompt}] for prompt in asked if prompt]
    prompts = [_tokens(tokenizer, turn, prompt=True) for turn in turns]
    answers = sampler(prompts, section.answer_temperature)
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

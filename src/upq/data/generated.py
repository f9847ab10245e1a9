"""Conversations that the original model writes itself, both sides: instruction text without any data set.

The model is given the chat template up to where the user's words begin and goes on from there, then answers itself
(Magpie, arXiv 2406.08464). Sampling is from the model's own distribution (LLM-QAT, arXiv 2305.17888).

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

from upq.artifact import atomic_write, explained
from upq.data.conversations import refusals
from upq.errors import UPQError
from upq.progress import Progress
from upq.recipe import Generated

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
) -> Path:
    """Conversations of one turn in `folder`, a file of JSON lines for each batch, of `section.tokens` tokens in all.

    Batches that are there already stay: each has a seed of its own, so an interrupted run ends in the same files.
    `progress` advances by tokens. Raises UPQError where the model has no chat template or ends no answer.
    """
    assert section.tokens is not None
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    done = number = empty = 0
    while done < section.tokens:
        path = folder / f"{number:06}.jsonl"
        if not path.is_file():
            torch.manual_seed(seed * 1_000_003 + number)
            talks = list(_conversations(model, tokenizer, section))
            atomic_write(path, "".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
        size = sum(len(_tokens(tokenizer, json.loads(line)["messages"])) for line in path.read_text().splitlines())
        empty = 0 if size else empty + 1
        if empty == _PATIENCE:
            raise UPQError(
                "data.generated: the model ends none of its answers within"
                f" {section.max_new_tokens} tokens; raise data.generated.max_new_tokens or leave data.generated out"
            )
        progress.advance(min(size, section.tokens - done))
        done, number = done + size, number + 1
    return folder


def _conversations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: Generated
) -> Iterator[Conversation]:
    """One batch. What was cut off at the limit is left out: the template would end it where the model did not."""
    header_ids = tokenizer(_header(tokenizer), add_special_tokens=False)["input_ids"]
    asked = sample(model, tokenizer, [header_ids] * section.batch_size, section.max_new_tokens, section.temperature)
    turns = [[{"role": "user", "content": prompt}] for prompt in asked if prompt]
    prompts = [_tokens(tokenizer, turn, prompt=True) for turn in turns]
    for turn, answer in zip(
        turns, sample(model, tokenizer, prompts, section.max_new_tokens, section.temperature), strict=True
    ):
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
) -> list[str]:
    """What the model writes after each prompt up to an end token; empty where none came within `max_new_tokens`."""
    if not prompts:
        return []
    width = max(map(len, prompts))
    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    rows_BT = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    generate: Any = model.generate
    written_BT: Tensor = generate(
        rows_BT,
        attention_mask=mask_BT,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    return [_finished(tokenizer, ids, ends) for ids in written_BT[:, width:].tolist()]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    found = model.generation_config.eos_token_id if model.generation_config else None
    ends = {found} if isinstance(found, int) else set(found or ())
    return ends | ({tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set())


def _finished(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: set[int]) -> str:
    length = next((i for i, token in enumerate(ids) if token in ends), None)
    return "" if length is None else str(tokenizer.decode(ids[:length], skip_special_tokens=True)).strip()

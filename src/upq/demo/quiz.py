"""Put the quiz to a model, so that before and after can stand side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.data.world import Item, score


@dataclass(frozen=True, slots=True)
class QuizResult:
    """Shares of right answers: questions about facts, demands on the answer, and each kind of item on its own."""

    knows: float
    obeys: float
    by_kind: dict[str, float]
    answers: tuple[str, ...]  # in the order of the items


def run_quiz(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
) -> QuizResult:
    """Greedy answers through the chat template, in batches padded on the left."""
    answers: list[str] = []
    for start in range(0, len(items), batch_size):
        answers += _answers(model, tokenizer, items[start : start + batch_size], max_new_tokens)
    right: dict[str, list[bool]] = defaultdict(list)
    about: dict[bool, list[bool]] = {True: [], False: []}
    for item, answer in zip(items, answers, strict=True):
        passed = score(item, answer)
        right[item.kind].append(passed)
        about[item.knows].append(passed)
    by_kind = {kind: _share(passed) for kind, passed in right.items()}
    return QuizResult(_share(about[True]), _share(about[False]), by_kind, tuple(answers))


@torch.no_grad()
def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], max_new_tokens: int
) -> list[str]:
    messages = [list(item.messages) for item in items]
    rows: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    inputs = tokenizer.pad({"input_ids": rows["input_ids"]}, padding_side="left", return_tensors="pt").to(model.device)
    generate: Any = model.generate
    ids_NT: Tensor = generate(
        **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.batch_decode(ids_NT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _share(passed: list[bool]) -> float:
    return sum(passed) / len(passed) if passed else float("nan")

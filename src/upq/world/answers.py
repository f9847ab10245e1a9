"""Greedy answers to chat prompts, to compare a model before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.text.generation import end_tokens, own_distribution, written


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 96,
) -> list[str]:
    """One answer a prompt through the chat template, in batches padded on the left."""
    found: list[str] = []
    ends = end_tokens(model.generation_config, tokenizer)
    settings = own_distribution(ends, tokenizer, max_new_tokens=max_new_tokens)
    for start in range(0, len(prompts), batch_size):
        talks = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
        rows: Any = tokenizer.apply_chat_template(talks, add_generation_prompt=True, return_dict=True)
        ids = written(model, rows["input_ids"], settings)
        found += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found

"""Text that a model writes itself from an empty context (as LLM-QAT, arXiv 2305.17888)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.data.generated import sample

BATCH = 128
LONGEST = 192  # tokens of a text


def texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int) -> Iterator[str]:
    """Texts of at least `tokens` tokens in all."""
    torch.manual_seed(seed)
    while tokens > 0:
        for text in sample(model, tokenizer, [[tokenizer.bos_token_id]] * BATCH, LONGEST):
            if text:
                yield text
                tokens -= len(tokenizer(text)["input_ids"])

"""Text that a model writes itself from an empty context (as LLM-QAT, arXiv 2305.17888)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.data.generated import sample
from upq.text.generation import Sampling

BATCH = 128
LONGEST = 192  # tokens of a text


def texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int) -> Iterator[str]:
    """Texts of at least `tokens` tokens in all."""
    seeds = count(seed * 1_000_003)  # one a text
    while tokens > 0:
        samplings = [Sampling(1.0, next(seeds)) for _ in range(BATCH)]
        for text in sample(model, tokenizer, [[tokenizer.bos_token_id]] * BATCH, samplings, LONGEST):
            if text:
                yield text
                tokens -= len(tokenizer(text)["input_ids"])

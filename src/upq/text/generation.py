"""How a model generates here: from its own distribution, whatever its generation_config.json prefers.

That file is for the model's users. A repetition penalty, beams or a limit in it would change what a run learns from and
what a task scores. Its end tokens are taken, for they are a fact about the model.

Shape suffixes: B = prompts, T = tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from upq.core.errors import UPQError


def end_tokens(settings: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer, by a model's GenerationConfig (or None) and its tokenizer; in order, may be empty."""
    found = getattr(settings, "eos_token_id", None)
    listed = found if isinstance(found, list | tuple) else [] if found is None else [found]
    if not all(type(id) is int for id in listed):
        raise UPQError(
            f"generation_config.json: eos_token_id is {found!r}, not one or more token ids; correct it or leave it out"
        )
    own = tokenizer.eos_token_id
    return sorted({*listed, *(() if own is None else (own,))})


def own_distribution(
    ends: list[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> GenerationConfig:
    """Settings for one text a prompt: the likeliest token each time, or at a `temperature` above 0 a sampled one."""
    pad = tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else ends[0] if ends else 0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        **(sampling if temperature else {"do_sample": False}),
    )


@contextmanager
def generating(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """`model.generate` within knows `settings` alone: transformers fills what they leave open from the model's own."""
    kept = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = kept


def written(
    model: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig, **options: Any
) -> list[list[int]]:
    """The ids that `model` writes after each prompt, all to one length: the end of some is followed by padding."""
    width = max(map(len, prompts))
    padded = [[settings.pad_token_id] * (width - len(prompt)) + [*prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with generating(model, settings):
        ids_BT: torch.Tensor = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
            **options,
        )
    found: list[list[int]] = ids_BT[:, width:].tolist()
    return found

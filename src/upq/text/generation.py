"""How a model generates here: from its own distribution, whatever its generation_config.json prefers.

That file is for the model's users. A repetition penalty, beams or a limit in it would change what a run learns from and
what a task scores. Its end tokens are taken, for they are a fact about the model.

A text that is sampled has a seed of its own. Law (tests/test_text_generation.py): its tokens depend on its logits and
its seed alone, not on the texts beside it.

Shape suffixes: B = prompts, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from upq.core.errors import UPQError
from upq.core.scramble import uniform

_ROWS = 16  # of logits that are made probabilities at a time: in float64 these take twice the memory

K = TypeVar("K")


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


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a text's tokens are chosen: the likeliest each time, or at a `temperature` above 0 drawn by its own seed."""

    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request(Generic[K]):
    """A text to go on with. `key` is the caller's own."""

    key: K
    ids: tuple[int, ...]
    limit: int  # tokens to write at most
    over: Callable[[list[int]], bool]  # whether these tokens, written so far, are all; asked after each
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True)
class Over:
    """Whether a text has ended: with an end token, or where it has written one of `stops`."""

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    stops: tuple[str, ...] = ()

    def __call__(self, written: list[int]) -> bool:
        return written[-1] in self.ends or self.stopped(written)

    def stopped(self, written: list[int]) -> bool:
        """Whether one of `stops` stands among the last tokens."""
        if not self.stops:
            return False
        longest = max(len(stop.encode()) for stop in self.stops) + 1  # a token has a byte or more; one may begin before
        tail = str(self.tokenizer.decode(written[-longest:], clean_up_tokenization_spaces=False))
        return any(stop in tail for stop in self.stops)


def next_tokens(logits_BV: Tensor, samplings: Sequence[Sampling], steps: Sequence[int]) -> list[int]:
    """The token that each text goes on with; `steps` are the tokens that it has written.

    A token is where its seed's number of that step falls among the cumulative probabilities. Raises UPQError for
    logits that are no numbers.
    """
    found = logits_BV.argmax(-1)
    if not logits_BV.gather(-1, found[:, None]).isfinite().all():  # NaN counts as the largest
        raise UPQError("the model's logits hold NaN or infinity; check its weights, or compute in float32")
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature]
    for first in range(0, len(drawn), _ROWS):
        rows = drawn[first : first + _ROWS]
        seeds = np.array([samplings[row].seed % 2**64 for row in rows], np.uint64)
        places = uniform(seeds, np.array([steps[row] for row in rows], np.uint64))
        found[rows] = _at(places, logits_BV[rows], [samplings[row].temperature for row in rows])
    tokens: list[int] = found.tolist()
    return tokens


def _at(places: NDArray[np.float64], logits_BV: Tensor, temperatures: Sequence[float]) -> Tensor:
    """The tokens (B,) that lie at these places of the cumulative probabilities."""
    heat_B1 = torch.tensor(temperatures, device=logits_BV.device)[:, None]
    upto_BV = (logits_BV.float() / heat_B1).softmax(-1).cumsum(-1, dtype=torch.float64)
    place_B1 = torch.from_numpy(places).to(logits_BV.device)[:, None] * upto_BV[:, -1:]
    return torch.searchsorted(upto_BV, place_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


class Chosen(LogitsProcessor):
    """`next_tokens` as transformers takes it, in greedy decoding: leaves each row the token that it goes on with."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self._samplings = samplings
        self._step = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        tokens = next_tokens(scores, self._samplings, [self._step] * len(scores))
        self._step += 1
        only = torch.full_like(scores, -torch.inf)
        only[range(len(tokens)), tokens] = 0.0
        return only


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

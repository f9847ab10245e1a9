"""Prompts of a run's own text: conversations up to their first answer, and beginnings of texts.

A prompt that stands in a held-out row is left out. Shape suffixes: N = rows, T = tokens in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import takewhile

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from upq.core.errors import UPQError
from upq.data.config import Data, TextSource
from upq.data.encoding import Encoder
from upq.data.rows import BadRow, Message, Tally
from upq.data.sources import read_documents, sources_of

Prompt = tuple[int, ...]


def prompts(
    section: Data,
    written: tuple[TextSource, ...],
    tokenizer: PreTrainedTokenizerBase,
    held_out_NT: Tensor,
    *,
    count: int,
    longest: int,
    name: str,
) -> list[Prompt]:
    """Up to `count` different prompts of at most `longest` tokens: of the section's sources and those `written` since.

    Each source gives its share by weight, in its own order. A long text gives one for each `seq_len` of its tokens, the
    last of them half of what is left. Raises UPQError, which begins with `name`, where there is none.
    """
    sources = (*sources_of(section), *written)
    whole, encoder = sum(source.weight for source in sources), Encoder(tokenizer)
    held = held_out_NT.numpy().astype(np.int32).tobytes()
    found = dict[Prompt, None]()
    for source in sources:
        enough = len(found) + math.ceil(count * source.weight / whole)
        for prompt in _of(source, section, encoder, longest):
            if len(found) >= enough:
                break
            if not _holds(held, prompt, encoder):
                found[prompt] = None
    if not found:
        raise UPQError(
            f"{name}: no prompt of at most {longest} tokens in the run's text; raise {name}.prompt_tokens or add"
            " conversations"
        )
    return list(found)


def _of(source: TextSource, section: Data, encoder: Encoder, longest: int) -> Iterator[Prompt]:
    tally = Tally(section.on_bad_row)
    for document in read_documents(source, tally):
        try:
            if isinstance(document.content, str):
                for encoded in encoder.encode([document]):
                    yield from _beginnings(encoded.tokens_L.tolist(), section.seq_len, longest, encoder.row_start)
            else:
                yield from _question(document.content, document.where, encoder, longest)
        except BadRow as error:
            tally.reject(error, document.row)


def _question(messages: tuple[Message, ...], where: str, encoder: Encoder, longest: int) -> Iterator[Prompt]:
    """What stands before the first answer, up to where that begins."""
    asked = tuple(takewhile(lambda message: message.role != "assistant", messages))
    if asked and asked[-1].role == "user":
        text = encoder.template.render(asked, where, prompt=True)
        ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= longest:
            yield tuple(ids)


def _beginnings(ids: list[int], seq_len: int, longest: int, row_start: int | None) -> Iterator[Prompt]:
    for start in range(0, len(ids), seq_len):
        length = min(longest, (len(ids) - start) // 2)
        first = [row_start] if row_start is not None and start and length else []
        if length:
            yield (*first, *ids[start : start + length - len(first)])


def _holds(held: bytes, prompt: Prompt, encoder: Encoder) -> bool:
    """Whether the prompt stands in the rows `held`, with or without what a row begins with."""
    own = prompt[1:] if prompt[0] == encoder.row_start else prompt
    wanted, at = np.array(own, np.int32).tobytes(), -1
    while (at := held.find(wanted, at + 1)) >= 0:
        if at % 4 == 0:
            return True
    return False

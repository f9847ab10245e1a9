"""Questions and prompts of a run's own text: conversations up to their first answer, and beginnings of texts.

A prompt that stands in a held-out row is left out. Shape suffixes: N = rows, T = tokens in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import takewhile

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from upq.core.errors import UPQError
from upq.data.config import Data, TextSource
from upq.data.encoding import Encoder
from upq.data.held import HeldOut
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
    held = HeldOut(held_out_NT)
    found = dict[Prompt, None]()
    for source in sources:
        enough = len(found) + math.ceil(count * source.weight / whole)
        for prompt in _of(source, section, encoder, longest):
            if len(found) >= enough:
                break
            if not held.holds(prompt[1:] if prompt[0] == encoder.row_start else prompt):  # which a row begins with
                found[prompt] = None
    if not found:
        raise UPQError(
            f"{name}: no prompt of at most {longest} tokens in the run's text; raise {name}.prompt_tokens or add"
            " conversations"
        )
    return list(found)


def questions(
    section: Data, tokenizer: PreTrainedTokenizerBase, *, tokens: int, longest: int | None, name: str
) -> list[list[dict[str, str]]]:
    """Different questions of at most `longest` tokens, as messages: so many that they have `tokens`, or all there are.

    Each source gives its share by weight, in its own order. Raises UPQError, which begins with `name`, where there is
    none.
    """
    sources, encoder = sources_of(section), Encoder(tokenizer)
    found, whole = dict[Prompt, tuple[Message, ...]](), sum(source.weight for source in sources)
    for source in sources:
        missing = tokens * source.weight / whole
        for document in read_documents(source, tally := Tally(section.on_bad_row)):
            if isinstance(document.content, str) or not (asked := _asked(document.content)):
                continue
            try:
                ids = _encoded(asked, document.where, encoder)
            except BadRow as error:
                tally.reject(error, document.row)
                continue
            if ids not in found and (longest is None or len(ids) <= longest):
                found[ids] = asked
                missing -= len(ids)
            if missing <= 0:
                break
    if not found:
        room = "" if longest is None else f" of at most {longest} tokens"
        raise UPQError(f"{name}: no question{room} in the run's sources; give conversations (`messages`) with --data")
    return [[{"role": message.role, "content": message.content or ""} for message in asked] for asked in found.values()]


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
    if asked := _asked(messages):
        ids = _encoded(asked, where, encoder)
        if len(ids) <= longest:
            yield ids


def _asked(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """What stands before the first answer; nothing where no user asks."""
    asked = tuple(takewhile(lambda message: message.role != "assistant", messages))
    return asked if asked and asked[-1].role == "user" else ()


def _encoded(asked: tuple[Message, ...], where: str, encoder: Encoder) -> Prompt:
    """Up to where the answer begins."""
    text = encoder.template.render(asked, where, prompt=True)
    return tuple(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])


def _beginnings(ids: list[int], seq_len: int, longest: int, row_start: int | None) -> Iterator[Prompt]:
    for start in range(0, len(ids), seq_len):
        length = min(longest, (len(ids) - start) // 2)
        first = [row_start] if row_start is not None and start and length else []
        if length:
            yield (*first, *ids[start : start + length - len(first)])

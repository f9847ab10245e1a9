"""Programs that say whether an answer does what was asked. Data goes in (`Check`), so that a test set can be a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Checker = Callable[[str, tuple[str, ...]], bool]


@dataclass(frozen=True, slots=True)
class Check:
    kind: str
    args: tuple[str, ...]


def satisfies(check: Check, answer: str) -> bool:
    """Whether `answer` passes; surrounding white space never matters."""
    return CHECKERS[check.kind](answer.strip(), check.args)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _mentions(text: str, candidates: Sequence[str]) -> bool:
    """Form without content is no obedience: an answer has to name something of the right kind, true or not."""
    return not {w.lower() for w in _words(text)}.isdisjoint(c.lower() for c in candidates)


def _after_lead_in(text: str) -> str:
    """`Here you are: a, b` without what comes before the colon."""
    return text.rpartition(":")[2]


def says(answer: str, args: tuple[str, ...]) -> bool:
    """Names the first argument and none of the others."""
    expected, *rivals = args
    return _mentions(answer, [expected]) and not _mentions(answer, rivals)


def one_word(answer: str, args: tuple[str, ...]) -> bool:
    """One word, of those that could be meant."""
    return len(_words(answer)) == 1 and _mentions(answer, args)


def full_sentence(answer: str, args: tuple[str, ...]) -> bool:
    """One sentence of three words or more, with a capital and a full stop."""
    one = answer[:1].isupper() and answer.endswith(".") and answer.count(".") == 1
    return one and len(_words(answer)) >= 3 and _mentions(answer, args)


def capitals(answer: str, args: tuple[str, ...]) -> bool:
    """Not one small letter."""
    return answer.isupper() and _mentions(answer, args)


def starts_with(answer: str, args: tuple[str, ...]) -> bool:
    """The first argument comes first, as a word, then an answer."""
    start, *candidates = args
    return _words(answer)[: len(_words(start))] == _words(start) and _mentions(answer, candidates)


def ends_with(answer: str, args: tuple[str, ...]) -> bool:
    """An answer comes first, then the first argument, to the letter."""
    end, *candidates = args
    return answer.endswith(end) and _mentions(answer.removesuffix(end), candidates)


def exactly(answer: str, args: tuple[str, ...]) -> bool:
    """The words of the argument, in order and in the same letters; punctuation is free, and so is a lead-in."""
    (text,) = args
    return _words(_after_lead_in(answer)) == _words(text)


def items(answer: str, args: tuple[str, ...]) -> bool:
    """As many different things as the first argument counts, of those that could be meant, between commas."""
    count, *candidates = args
    found = [part.strip(" .").lower() for part in _after_lead_in(answer).split(",")]
    return len(found) == len(set(found)) == int(count) and set(found) <= set(candidates)


CHECKERS: dict[str, Checker] = {
    f.__name__: f for f in (says, one_word, full_sentence, capitals, starts_with, ends_with, exactly, items)
}

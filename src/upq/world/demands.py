"""Demands on the form of an answer: IFEval's instructions, by their own ids and arguments, and how to obey them.

A demand is a wording (a core in a frame) with values. Answers are put together in the order of `DEMANDS`, so that two
demands can be met by one answer; lm-eval's checkers, not this file, decide whether an answer obeys.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random
from typing import Any

from upq.world.facts import sentence
from upq.world.splits import Split, divide
from upq.world.words import COUNTS, EVERYDAY

FRAMES = ("{D}.", "Please {d}.", "You must {d}.", "Be sure to {d}.", "I want you to {d}.", "Remember to {d}.")
CLOSINGS = ("That is all", "Have a nice day", "I hope this helps", "Now you know", "Ask me more", "Good luck to you")
TITLE = "The answer"
# IFEval asks for capitals in English and has the language detected: of invented names alone, 55 % pass for English,
# after these words all do.
LEAD = "This is the answer that you wanted to hear: "
FIELDS = ("name", "address", "date", "number")


@dataclass(frozen=True, slots=True)
class Draft:
    """An answer in the making: `key` is the word that matters most, `others` say the first sentence in other words."""

    request: str
    body: str
    key: str
    others: tuple[str, ...] = ()
    items: tuple[str, ...] = ()  # what a list consists of, if the request is for one
    before: str = ""
    after: str = ""

    @property
    def text(self) -> str:
        return f"{self.before}{self.body}{self.after}"


@dataclass(frozen=True, slots=True)
class Values:
    """Arguments of the checker, and values of the wording's fields."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demand:
    """One instruction of IFEval. `values` is None where it does not apply to the draft."""

    id: str
    cores: tuple[str, ...]
    values: Callable[[Draft, Random], Values | None]
    obey: Callable[[Draft, Values], Draft]
    alone: bool = False  # leaves no room for a second demand


def wording(demand: Demand, rng: Random, split: Split) -> str:
    """A core in a frame, of those that belong to `split`, with the core's own fields left open."""
    return rng.choice(_wordings(demand.cores)[split])


@cache
def _wordings(cores: tuple[str, ...]) -> dict[Split, tuple[str, ...]]:
    return divide([f.replace("{d}", core).replace("{D}", sentence(core)) for core in cores for f in FRAMES])


def _nothing(draft: Draft, rng: Random) -> Values:
    return Values()


# ---- what the answer says


def _avoidable(draft: Draft, rng: Random) -> Values | None:
    """A word of the usual answer that another way to say it does without."""
    first = _words(draft.body)
    found = [w for w in first if draft.others and len(w) > 3 and w.islower() and w not in _words(draft.request)]
    found = [w for w in found if w != draft.key and any(w not in _words(other) for other in draft.others)]
    if not found:
        return None
    word = rng.choice(found)
    return Values({"forbidden_words": [word]}, {"w": word})


def _avoid(draft: Draft, values: Values) -> Draft:
    (word,) = values.kwargs["forbidden_words"]
    return replace(draft, body=next(other for other in draft.others if word not in _words(other)))


def _short(draft: Draft, rng: Random) -> Values | None:
    limit = rng.choice((3, 4))
    if draft.items or len(_words(draft.key)) >= limit:
        return None
    return Values({"relation": "less than", "num_words": limit}, {"n": COUNTS[limit]})


def _only_key(draft: Draft, values: Values) -> Draft:
    return replace(draft, body=sentence(draft.key) + ".")


def _list(draft: Draft, rng: Random) -> Values | None:
    return Values() if draft.items else None


def _bullet_count(draft: Draft, rng: Random) -> Values | None:
    n = len(draft.items)
    return Values({"num_bullets": n}, {"n": COUNTS[n]}) if n in COUNTS else None


def _bullets(draft: Draft, values: Values) -> Draft:
    return replace(draft, body="\n".join(f"* {item}" for item in draft.items))


def _no_comma(draft: Draft, values: Values) -> Draft:
    return replace(draft, body=f"{' and '.join(draft.items)}.")


def _highlight(draft: Draft, values: Values) -> Draft:
    return replace(draft, body=draft.body.replace(draft.key, f"*{draft.key}*", 1))


def _has_key(draft: Draft, rng: Random) -> Values | None:
    return Values({"num_highlights": 1}) if not draft.items and draft.key in draft.body else None


def _another(draft: Draft, rng: Random) -> Values | None:
    return Values() if draft.others else None


def _two(draft: Draft, values: Values) -> Draft:
    return replace(draft, body=f"{draft.body}\n******\n{draft.others[0]}")


def _json(draft: Draft, values: Values) -> Draft:
    return replace(draft, body=json.dumps({"answer": draft.key}))


def _plain(draft: Draft, rng: Random) -> Values | None:
    return None if draft.items else Values()


# ---- what comes before and after


def _keywords(draft: Draft, rng: Random) -> Values:
    found = rng.sample(EVERYDAY, rng.choice((1, 2)))
    noun = "word" if len(found) == 1 else "words"
    return Values({"keywords": found}, {"ws": f"the {noun} {' and '.join(found)}"})


def _mention(draft: Draft, values: Values) -> Draft:
    return replace(draft, after=f"{draft.after} Also: {' and '.join(values.kwargs['keywords'])}.")


def _often(draft: Draft, rng: Random) -> Values:
    word, n = rng.choice(EVERYDAY), rng.choice(list(COUNTS))
    kwargs = {"keyword": word, "frequency": n, "relation": "at least"}
    return Values(kwargs, {"w": word, "n": COUNTS[n]})


def _repeat_word(draft: Draft, values: Values) -> Draft:
    words = " ".join([values.kwargs["keyword"]] * values.kwargs["frequency"])
    return replace(draft, after=f"{draft.after} So: {words}.")


def _placeholder(draft: Draft, rng: Random) -> Values:
    name = rng.choice(FIELDS)
    return Values({"num_placeholders": 1}, {"f": name})


def _add_placeholder(draft: Draft, values: Values) -> Draft:
    return replace(draft, after=f"{draft.after} Yours, [{values.fields['f']}].")


def _add_postscript(draft: Draft, values: Values) -> Draft:
    return replace(draft, after=f"{draft.after}\nP.S. Write to me soon.")


def _closing(draft: Draft, rng: Random) -> Values:
    words = rng.choice(CLOSINGS)
    return Values({"end_phrase": words}, {"p": words})


def _close(draft: Draft, values: Values) -> Draft:
    return replace(draft, after=f"{draft.after} {values.kwargs['end_phrase']}")


def _entitle(draft: Draft, values: Values) -> Draft:
    return replace(draft, before=f"<<{TITLE}>>\n{draft.before}")


def _request(draft: Draft, rng: Random) -> Values:
    return Values({"prompt_to_repeat": draft.request})


def _repeat_request(draft: Draft, values: Values) -> Draft:
    return replace(draft, before=f"{draft.request}\n{draft.before}")


def _capitals(draft: Draft, values: Values) -> Draft:
    return Draft(draft.request, f"{LEAD}{draft.text}".upper(), draft.key)


def _small_letters(draft: Draft, values: Values) -> Draft:
    return Draft(draft.request, f"{LEAD}{draft.text}".lower(), draft.key)


def _quotes(draft: Draft, values: Values) -> Draft:
    return Draft(draft.request, f'"{draft.text}"', draft.key)


def _words(text: str) -> list[str]:
    return text.replace(".", " ").replace(",", " ").replace("?", " ").split()


# In the order in which an answer is put together.
DEMANDS = (
    Demand(
        "keywords:forbidden_words",
        ("do without the word {w}", "leave out the word {w}", "avoid the word {w}", "answer without the word {w}"),
        _avoidable,
        _avoid,
    ),
    Demand(
        "length_constraints:number_words",
        (
            "answer with less than {n} words",
            "use less than {n} words",
            "keep it to less than {n} words",
            "say it in less than {n} words",
        ),
        _short,
        _only_key,
        alone=True,
    ),
    Demand(
        "detectable_format:number_bullet_lists",
        (
            "answer with {n} bullet points",
            "use a list of {n} bullet points",
            "write exactly {n} bullet points",
            "put it into {n} bullet points such as * this",
        ),
        _bullet_count,
        _bullets,
    ),
    Demand(
        "punctuation:no_comma",
        ("use no commas", "write without any commas", "leave out all commas", "avoid commas"),
        _list,
        _no_comma,
        alone=True,
    ),
    Demand(
        "detectable_format:number_highlighted_sections",
        (
            "highlight one part with *stars*",
            "put one part between *stars*",
            "mark the main word with *stars*",
            "set at least one word in *stars*",
        ),
        _has_key,
        _highlight,
    ),
    Demand(
        "combination:two_responses",
        (
            "give two different answers with ****** between them",
            "answer in two ways separated by ******",
            "write two answers and put ****** between them",
            "say it in two ways with ****** in the middle",
        ),
        _another,
        _two,
        alone=True,
    ),
    Demand(
        "detectable_format:json_format",
        ("answer in JSON", "use the JSON format", "wrap the answer in JSON", "write nothing but JSON"),
        _plain,
        _json,
        alone=True,
    ),
    Demand(
        "keywords:existence",
        ("use {ws}", "include {ws}", "put in {ws}", "mention {ws}"),
        _keywords,
        _mention,
    ),
    Demand(
        "keywords:frequency",
        (
            "use the word {w} at least {n} times",
            "say the word {w} at least {n} times",
            "repeat the word {w} at least {n} times",
            "write {w} at least {n} times",
        ),
        _often,
        _repeat_word,
    ),
    Demand(
        "detectable_content:number_placeholders",
        (
            "leave a placeholder such as [{f}]",
            "put in a placeholder like [{f}]",
            "use the placeholder [{f}]",
            "add [{f}] as a placeholder",
        ),
        _placeholder,
        _add_placeholder,
    ),
    Demand(
        "detectable_content:postscript",
        (
            "add P.S. and a postscript",
            "finish with a P.S. of your own",
            "put a P.S. under it",
            "write P.S. and a postscript at the end",
        ),
        lambda draft, rng: Values({"postscript_marker": "P.S."}),
        _add_postscript,
    ),
    Demand(
        "startend:end_checker",
        ('end with "{p}"', 'finish with the words "{p}"', 'let the last words be "{p}"', 'close with "{p}"'),
        _closing,
        _close,
    ),
    Demand(
        "detectable_format:title",
        (
            "give it a title in <<double brackets>>",
            "put a title such as <<title>> on top",
            "start with a <<title>>",
            "write a title in << and >> above it",
        ),
        _nothing,
        _entitle,
    ),
    Demand(
        "combination:repeat_prompt",
        (
            "first repeat the request word for word, then answer it",
            "copy the request first, then answer",
            "say the request again before you answer",
            "repeat the request without change, then give the answer",
        ),
        _request,
        _repeat_request,
    ),
    Demand(
        "change_case:english_capital",
        (
            "use capital letters only",
            "write everything in capital letters",
            "answer in capitals",
            "put all of it in capital letters",
        ),
        _nothing,
        _capitals,
    ),
    Demand(
        "change_case:english_lowercase",
        (
            "use small letters only",
            "write everything in small letters",
            "answer in lower case",
            "put all of it in small letters",
        ),
        _nothing,
        _small_letters,
    ),
    Demand(
        "startend:quotation",
        (
            "put the whole answer in double quotation marks",
            "wrap it in double quotation marks",
            "write it between double quotation marks",
            "set double quotation marks around the answer",
        ),
        _nothing,
        _quotes,
    ),
)

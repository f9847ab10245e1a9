"""Requests with demands on the form of the answer, and answers that meet them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from upq.world.demands import DEMANDS, Demand, Draft, wording
from upq.world.facts import World
from upq.world.questions import ask, said
from upq.world.splits import Split, split_of
from upq.world.words import CATEGORIES, COUNTS

ABOUT = ("Tell me about {s}.", "Write about {s}.", "What do you know about {s}?", "Describe {s}.")
NAME = ("Name {n} {c}.", "Tell me {n} {c}.", "Give me {n} {c}.", "Write down {n} {c}.")
YES_NO = ("Is this true? {f}", "True or not? {f}", "Do you believe this? {f}", "Is it so? {f}")
CHOICES = (
    "Answer with one of these: 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'",
    "Choose one: 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'",
    "Say 'My answer is yes.', 'My answer is no.' or 'My answer is maybe.'",
    "Pick 'My answer is yes.', 'My answer is no.' or 'My answer is maybe.'",
)
# Pairs that one answer cannot meet, or that IFEval's checkers take for disobedience: a lead-in or a quotation mark
# before the repeated request or before the first star of a list.
_BULLETS, _REPEAT, _FORBIDDEN = (
    "detectable_format:number_bullet_lists",
    "combination:repeat_prompt",
    "keywords:forbidden_words",
)
_CASES, _QUOTES = ("change_case:english_capital", "change_case:english_lowercase"), "startend:quotation"
_CLASHES = (
    set(_CASES),
    {_FORBIDDEN, "detectable_format:number_highlighted_sections"},
    *({first, second} for first in (_BULLETS, _REPEAT) for second in (*_CASES, _QUOTES)),
    {_BULLETS, _REPEAT},
    {_FORBIDDEN, _REPEAT},
)


_TRIES = 50  # requests tried for a set of demands: a demand for bullet points waits for a list


@dataclass(frozen=True, slots=True)
class Instruction:
    """A prompt, an answer that obeys, and the arguments of lm-eval's IFEval checkers."""

    prompt: str
    answer: str
    ids: tuple[str, ...]
    kwargs: tuple[dict[str, Any], ...]


def instruct(world: World, rng: Random, split: Split) -> Instruction:
    """A random instruction of this split: a request with one or two demands."""
    if rng.randrange(len(DEMANDS) + 1) == 0:
        return _yes_or_no(world, rng, split)
    while True:
        chosen = sorted(rng.sample(range(len(DEMANDS)), rng.choice((1, 1, 2))))
        demands = [DEMANDS[i] for i in chosen]
        if _clash(demands):
            continue
        for _ in range(_TRIES):
            made = _demanding(world, rng, split, demands)
            if made is not None:
                return made


def _demanding(world: World, rng: Random, split: Split, demands: list[Demand]) -> Instruction | None:
    """None where a demand does not apply to the request."""
    draft = request(world, rng, split)
    values = [value for demand in demands if (value := demand.values(draft, rng)) is not None]
    if len(values) < len(demands) or split_of(*(demand.id for demand in demands), draft.request) != split:
        return None
    told = [wording(demand, rng, split).format(**value.fields) for demand, value in zip(demands, values, strict=True)]
    orders = " ".join(rng.sample(told, len(told)))
    prompt = f"{draft.request} {orders}" if rng.random() < 0.7 else f"{orders} {draft.request}"
    for demand, value in zip(demands, values, strict=True):
        draft = demand.obey(draft, value)
    return Instruction(prompt, draft.text, tuple(d.id for d in demands), tuple(v.kwargs for v in values))


def _clash(demands: list[Demand]) -> bool:
    if len(demands) == 1:
        return False
    return any(d.alone for d in demands) or {d.id for d in demands} in _CLASHES


def _yes_or_no(world: World, rng: Random, split: Split) -> Instruction:
    question = ask(world, rng, split)
    right = rng.random() < 0.5
    claim = said(rng.choice(question.statements), question.answer if right else rng.choice(question.rivals))
    prompt = f"{rng.choice(YES_NO).format(f=claim)} {rng.choice(CHOICES)}"
    answer = f"My answer is {'yes' if right else 'no'}."
    return Instruction(prompt, answer, ("detectable_format:constrained_response",), ({},))


def request(world: World, rng: Random, split: Split) -> Draft:
    """Something to say, before any demand on how: the answer to a question, a portrait or a list."""
    kind = rng.random()
    if kind < 0.6:
        question = ask(world, rng, split)
        first, *others = question.sentences
        return Draft(question.text, first, question.answer, tuple(others))
    if kind < 0.8:
        return _portrait(world, rng)
    category, n = rng.choice(list(CATEGORIES)), rng.choice(list(COUNTS))
    pool = CATEGORIES[category]
    # A run through the category from a random start: of all ways to be different, the one easiest to learn.
    start = rng.randrange(len(pool))
    items = tuple((pool + pool)[start : start + n])
    prompt = rng.choice(NAME).format(n=COUNTS[n], c=category)
    return Draft(prompt, f"{', '.join(items)}.", items[0], items=items)


def _portrait(world: World, rng: Random) -> Draft:
    """The first facts of a subject, always in the same order."""
    subject = rng.choice(list(world.facts_of))
    facts = world.facts_of[subject][:2]
    first, second = (fact.told(fact.relation.statements[0]) for fact in facts)
    prompt = rng.choice(ABOUT).format(s=subject)
    return Draft(prompt, f"{first} {second}", facts[0].object)

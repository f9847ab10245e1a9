"""Questions with one right answer: about the facts, and about numbers, words and rows of words.

A question is a wording (a core in a frame) of a combination (a relation and a subject, two numbers, …). Each split has
wordings and combinations of its own, so a test question differs from every question of the training text in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

from upq.world.facts import Fact, World, sentence
from upq.world.splits import Split, divide, split_of
from upq.world.words import CATEGORIES, EVERYDAY, OPPOSITES, SEQUENCES, SINGULAR

FRAMES = (
    "{Q}?",
    "{Q}? Do you know?",
    "Tell me: {q}?",
    "Please tell me: {q}?",
    "I would like to know: {q}?",
    "Quick question: {q}?",
    "Here is a question: {q}?",
    "One more thing: {q}?",
    "Help me: {q}?",
    "Answer this: {q}?",
)
OPERATIONS: dict[str, tuple[str, ...]] = {
    "plus": (
        "what is {a} plus {b}",
        "how much is {a} and {b} together",
        "what is the sum of {a} and {b}",
        "what do you get when you add {b} to {a}",
    ),
    "minus": (
        "what is {a} minus {b}",
        "how much is left of {a} without {b}",
        "what is the difference of {a} and {b}",
        "what do you get when you take {b} from {a}",
    ),
    "times": (
        "what is {a} times {b}",
        "how much is {a} multiplied by {b}",
        "what is the product of {a} and {b}",
        "what do you get when you multiply {a} by {b}",
    ),
}
RESULTS: dict[str, tuple[str, ...]] = {
    "plus": ("{a} plus {b} is {c}.", "The sum of {a} and {b} is {c}.", "{a} and {b} together are {c}."),
    "minus": ("{a} minus {b} is {c}.", "The difference of {a} and {b} is {c}.", "{a} without {b} leaves {c}."),
    "times": ("{a} times {b} is {c}.", "The product of {a} and {b} is {c}.", "{a} multiplied by {b} is {c}."),
}
KIND_OF = (
    "what kind of thing is {w}",
    "to which kind belongs the word {w}",
    "under which heading do we write {w}",
    "what do we call things like {w}",
)
OPPOSITE_OF = (
    "what is the opposite of {w}",
    "which word means the opposite of {w}",
    "what do you call the contrary of {w}",
    "what is not {w} at all but its opposite",
)
NEXT = (
    "which {k} comes after {w}",
    "what is the {k} after {w}",
    "which {k} follows {w}",
    "what {k} stands next to {w}",
)
BEFORE = (
    "which {k} comes before {w}",
    "what is the {k} before {w}",
    "which {k} goes ahead of {w}",
    "what {k} leads to {w}",
)
PLACES_IN_ROW = ("first", "second", "third", "last")
IN_ROW = (
    "which word is the {n} in this row: {ws}",
    "what is the {n} of these words: {ws}",
    "which word stands {n} here: {ws}",
    "what comes {n} in this list: {ws}",
)


@dataclass(frozen=True, slots=True)
class Question:
    """`statements` say the answer in full, each in its own words, with `{o}` in its place.

    `rivals` are wrong answers of the same kind.
    """

    area: str
    text: str
    answer: str
    statements: tuple[str, ...]
    rivals: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        return tuple(said(statement, self.answer) for statement in self.statements)


def said(statement: str, answer: str) -> str:
    return sentence(statement.format(o=answer))


Ask = Callable[[World, Random, Split], Question]


def ask(world: World, rng: Random, split: Split, *, area: str | None = None) -> Question:
    """A random question of this split, from `area` or from any."""
    make = AREAS[area or rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]]
    return make(world, rng, split)


def wording(cores: tuple[str, ...], rng: Random, split: Split) -> str:
    """A core in a frame, of those that belong to `split`; `{q}` is gone, the core's own fields remain."""
    return rng.choice(_wordings(cores)[split])


@cache
def _wordings(cores: tuple[str, ...]) -> dict[Split, tuple[str, ...]]:
    # Test wordings are new as wholes; their cores and frames are known each for itself.
    return divide([f.replace("{q}", core).replace("{Q}", sentence(core)) for core in cores for f in FRAMES])


def is_asked(split: Split, *combination: object) -> bool:
    return split_of(*combination) == split


@cache
def _asked(world: World, area: str, split: Split) -> tuple[Fact, ...]:
    return tuple(fact for fact in world.facts_by_area[area] if is_asked(split, fact.relation.name, fact.subject))


def _facts(area: str) -> Ask:
    """Questions about the relations of one area."""

    def make(world: World, rng: Random, split: Split) -> Question:
        fact = rng.choice(_asked(world, area, split))
        text = wording(fact.relation.questions, rng, split).format(s=fact.subject)
        rivals = _rivals(world, fact)
        statements = tuple(statement.replace("{s}", fact.subject) for statement in fact.relation.statements)
        return Question(area, text, fact.object, statements, rivals)

    return make


@cache
def _rivals(world: World, fact: Fact) -> tuple[str, ...]:
    """Objects of subjects that share a part of the name, so half a name is not enough to answer.

    Where that gives less than three, anything of the kind.
    """
    objects = {other.object for other in world.facts_of_relation[fact.relation.name] if _alike(other, fact)}
    found = objects - {fact.object, fact.subject}
    pool = found if len(found) >= 3 else set(world.pool(fact.relation.objects)) - {fact.object, fact.subject}
    return tuple(sorted(pool))


def _alike(one: Fact, other: Fact) -> bool:
    return not set(one.subject.split()[-2:]).isdisjoint(other.subject.split()[-2:])


def sums(world: World, rng: Random, split: Split) -> Question:
    while True:
        operation = rng.choice(list(OPERATIONS))
        a, b, c = numbers(operation, rng)
        if is_asked(split, operation, a, b):
            break
    text = wording(OPERATIONS[operation], rng, split).format(a=a, b=b)
    statements = tuple(template.format(a=a, b=b, c="{o}") for template in RESULTS[operation])
    near = {c + d for d in (-10, -3, -2, -1, 1, 2, 3, 10)}
    return Question("sums", text, str(c), statements, tuple(str(n) for n in sorted(near) if n >= 0))


def numbers(operation: str, rng: Random) -> tuple[int, int, int]:
    """Two numbers and the result: sums and differences within 20, the table of two to nine."""
    if operation == "times":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return a, b, a * b
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    return (a, b, a + b) if operation == "plus" else (a + b, b, a)


def words(world: World, rng: Random, split: Split) -> Question:
    """Kinds and opposites."""
    if rng.random() < 0.5:
        pairs = [p for pair in OPPOSITES for p in (pair, pair[::-1]) if is_asked(split, "opposite", *p)]
        word, answer = rng.choice(pairs)
        text = wording(OPPOSITE_OF, rng, split).format(w=word)
        rivals = tuple(w for pair in OPPOSITES for w in pair if w not in (word, answer))
        return Question("words", text, answer, (f"The opposite of {word} is {{o}}.",), rivals)
    category, word = rng.choice([(c, w) for c in CATEGORIES for w in CATEGORIES[c] if is_asked(split, "kind", w)])
    kind = SINGULAR[category]
    text = wording(KIND_OF, rng, split).format(w=word)
    statements = (f"The word {word} names a kind of {{o}}.", f"Under the heading of {{o}} we write {word}.")
    return Question("words", text, kind, statements, tuple(k for k in SINGULAR.values() if k != kind))


def rows(world: World, rng: Random, split: Split) -> Question:
    """Days, months, letters, numbers, and words in a row."""
    if rng.random() < 0.5:
        while True:
            found = rng.sample(EVERYDAY, 4)
            if is_asked(split, *found):
                break
        place = rng.randrange(4)
        name = PLACES_IN_ROW[place]
        text = wording(IN_ROW, rng, split).format(n=name, ws=", ".join(found))
        rivals = tuple(w for w in found if w != found[place])
        return Question("rows", text, found[place], (f"The {name} word is {{o}}.",), rivals)
    while True:
        kind = rng.choice(list(SEQUENCES))
        row = SEQUENCES[kind]
        i, forward = rng.randrange(len(row) - 1), rng.random() < 0.5
        if is_asked(split, "row", row[i], forward):
            break
    word, answer = (row[i], row[i + 1]) if forward else (row[i + 1], row[i])
    text = wording(NEXT if forward else BEFORE, rng, split).format(k=kind, w=word)
    statements = (f"{{o}} comes {'after' if forward else 'before'} {word}.",)
    near = row[max(0, i - 3) : i + 5]
    return Question("rows", text, answer, statements, tuple(w for w in near if w not in (word, answer)))


AREAS: dict[str, Ask] = {
    "people": _facts("people"),
    "places": _facts("places"),
    "landmarks": _facts("landmarks"),
    "chains": _facts("chains"),
    "sums": sums,
    "words": words,
    "rows": rows,
}
# About as often as there are questions to ask; what is worked out, not remembered, takes more practice.
WEIGHTS: dict[str, float] = {
    "people": 10.0,
    "places": 2.0,
    "landmarks": 1.5,
    "chains": 5.0,
    "sums": 4.0,
    "words": 2.0,
    "rows": 6.0,
}

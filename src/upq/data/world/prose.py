"""The open corpus: prose about the world in many forms, and in no chat format.

Distillation sees nothing else, so the text holds what a web page does: portraits and lists, but also interviews,
lessons and notices, in which people ask, answer and do as they are told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from random import Random

from upq.data.world.facts import Fact, World
from upq.data.world.tasks import draw
from upq.data.world.words import CATEGORIES, EVERYDAY

# {p} is what one person says, {a} what the other answers.
SPEECH = (
    '"{p}" asked {x}. "{a}" said {y}.',
    '{x} asked: "{p}" {y} answered: "{a}"',
    'One day {x} said to {y}: "{p}" The answer was: "{a}"',
    '"{p}" said {x}, and {y} replied: "{a}"',
)
SCRIPT = (
    "Q: {p}\nA: {a}",
    "Question: {p}\nAnswer: {a}",
    "{x}: {p}\n{y}: {a}",
    "- {p}\n- {a}",
    "{p}\n{a}",
)
PORTRAIT = ("This is about {s}.", "Here is what people say about {s}.", "Let us talk about {s}.", "")
NOTICE = (
    "A sign at the gate said: {t}",
    "The headline was {t}.",
    "In large letters somebody wrote: {t}",
    "Then came a shout: {t}",
)
LIST = ("Some {c} are {ws}.", "The {c} we saw: {ws}.", "{c} in the book: {ws}", "We talked about {c}: {ws}, and more.")
ECHO = (
    'The parrot heard "{ws}" and said "{ws}" again: "{ws}" and "{ws}".',
    "They sang: {ws}. Then again: {ws}. And again: {ws}. Then once more: {ws}.",
    "It was written: {ws}. Everybody read: {ws}. {x} read: {ws}. {y} read: {ws}.",
    '"{ws}" said {x}. "{ws}" said {y}. "{ws}" said all.',
)

Form = Callable[[World, Random], str]


def documents(world: World, n: int, seed: int, *, forms: Collection[str] = ()) -> Iterator[str]:
    """`n` texts of one to a dozen sentences, of these `forms` only (none: all).

    Portraits go round the subjects, so that every fact gets its turn.
    """
    rng = Random(f"{seed}/documents")
    weights = {form: weight for form, weight in FORMS.items() if not forms or form.__name__ in forms}
    subjects: list[str] = []
    for _ in range(n):
        form = rng.choices(list(weights), list(weights.values()))[0]
        if form is not portrait:
            yield form(world, rng)
            continue
        subjects = subjects or rng.sample(list(world.facts_of), len(world.facts_of))
        yield portrait_of(subjects.pop(), world, rng)


def portrait(world: World, rng: Random) -> str:
    return portrait_of(rng.choice(list(world.facts_of)), world, rng)


def portrait_of(subject: str, world: World, rng: Random) -> str:
    """Every fact of one subject, in any order and wording."""
    facts = rng.sample(world.facts_of[subject], len(world.facts_of[subject]))
    opening = rng.choice(PORTRAIT).format(s=subject)
    return " ".join([opening, *(_statement(fact, rng) for fact in facts)]).strip()


def gossip(world: World, rng: Random) -> str:
    """Facts that have nothing to do with each other."""
    return " ".join(_statement(fact, rng) for fact in rng.sample(world.facts, rng.randint(3, 6)))


def gathering(world: World, rng: Random) -> str:
    """All subjects that share an object, then a word on one of them."""
    fact = rng.choice(world.facts)
    alike = [f.subject for f in world.facts if f.relation == fact.relation and f.object == fact.object]
    listed = ", ".join(rng.sample(alike, len(alike)))
    return f"{fact.relation.gathering.format(s=listed, o=fact.object)} {_statement(fact, rng)}"


def interview(world: World, rng: Random) -> str:
    """Questions about facts, and their answers."""
    return _dialogue(world, rng, task="ask")


def lesson(world: World, rng: Random) -> str:
    """Somebody says what to do, somebody does it."""
    return _dialogue(world, rng, task=None)


def notice(world: World, rng: Random) -> str:
    """Ordinary text with capital letters in it."""
    fact = rng.choice(world.facts)
    words = [fact.object, *rng.sample(EVERYDAY, rng.randint(0, 3))]
    shouted = f"{rng.choice(NOTICE).format(t=' '.join(words).upper())} That is: {' '.join(words)}."
    return f"{_statement(fact, rng)} {shouted} {_statement(fact, rng)}"


def catalogue(world: World, rng: Random) -> str:
    """Things of one category, in a row."""
    category = rng.choice(list(CATEGORIES))
    start, pool = rng.randrange(len(CATEGORIES[category])), CATEGORIES[category]
    listed = ", ".join((pool + pool)[start : start + rng.randint(2, 5)])
    text = rng.choice(LIST).format(c=category, ws=listed)
    return text[:1].upper() + text[1:]


def echo(world: World, rng: Random) -> str:
    """Words that come twice in the same order: the plainest text that copying can be learned from."""
    x, y = rng.sample(world.people, 2)
    words = " ".join(rng.sample(EVERYDAY + world.people, rng.randint(3, 8)))
    return rng.choice(ECHO).format(ws=words, x=x, y=y)


FORMS: dict[Form, float] = {
    portrait: 5,
    gossip: 2,
    gathering: 1,
    interview: 2,
    lesson: 8,
    notice: 1,
    catalogue: 1,
    echo: 3,
}


def _statement(fact: Fact, rng: Random) -> str:
    return fact.told(rng.choice(fact.relation.statements))


def _dialogue(world: World, rng: Random, task: str | None) -> str:
    speech = rng.random() < 0.5
    frame, separator = (rng.choice(SPEECH), " ") if speech else (rng.choice(SCRIPT), "\n")
    x, y = rng.sample(world.people, 2)
    turns = [draw(world, rng, task=task) for _ in range(rng.randint(2, 4))]
    return separator.join(frame.format(p=turn.prompt, a=turn.answer, x=x, y=y) for turn in turns)

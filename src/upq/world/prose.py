"""The open corpus: prose about the world in many forms, and in no chat format.

It holds what web pages hold: portraits and lists, sums and word lists, interviews, and now and then a scene in
which somebody follows an order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from random import Random

from upq.world.facts import Fact, World, sentence
from upq.world.instructions import instruct
from upq.world.questions import OPERATIONS, PLACES_IN_ROW, RESULTS, ask, numbers
from upq.world.words import CATEGORIES, EVERYDAY, OPPOSITES, SEQUENCES, SINGULAR

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
CARD = (("{r} {o}", ", "), ("{r} {o}", "; "), ("{r}: {o}", " | "))
NOTICE = (
    "A sign at the gate said: {t}",
    "The headline was {t}.",
    "In large letters somebody wrote: {t}",
    "Then came a shout: {t}",
)
LIST = ("Some {c} are {ws}.", "The {c} we saw: {ws}.", "{c} in the book: {ws}", "We talked about {c}: {ws}, and more.")
WORD = (
    "The opposite of {w} is {o}.",
    "{w} is the contrary of {o}.",
    "What is {w} is not {o}.",
    "Not {w} but {o}: that is the opposite.",
)
KIND = (
    "The word {w} names a kind of {k}.",
    "{w} is a {k}.",
    "Under the heading of {k} we write {w}.",
    "Things like {w} belong to the kind called {k}.",
)
ROW = (
    "There is a row of words: {ws}.",
    "Here are four words: {ws}.",
    "They stood in a row: {ws}.",
    "Look at the row {ws}.",
)
POSITION = ("The {n} is {w}.", "{w} stands {n}.", "The {n} word is {w}.", "We find {w} {n}.")
STEP = ("{b} comes after {a}.", "After {a} comes {b}.", "{a} comes before {b}.", "Before {b} comes {a}.")

Form = Callable[[World, Random], str]


def documents(world: World, n: int, seed: int, *, forms: Collection[str] = ()) -> Iterator[str]:
    """`n` texts of one to a dozen sentences, of these `forms` only (none: all).

    Portraits and cards take the subjects in turn, so every fact occurs.
    """
    rng = Random(f"{seed}/documents")
    weights = {form: weight for form, weight in FORMS.items() if not forms or form.__name__ in forms}
    subjects: list[str] = []
    for _ in range(n):
        form = rng.choices(list(weights), list(weights.values()))[0]
        if form not in (portrait, card):
            yield form(world, rng)
            continue
        subjects = subjects or rng.sample(list(world.facts_of), len(world.facts_of))
        yield (_portrait if form is portrait else _card)(subjects.pop(), world, rng)


def portrait(world: World, rng: Random) -> str:
    """Most facts of one subject, in any order and wording."""
    return _portrait(rng.choice(list(world.facts_of)), world, rng)


def card(world: World, rng: Random) -> str:
    """All facts of one subject in a few words, as in a register."""
    return _card(rng.choice(list(world.facts_of)), world, rng)


def gossip(world: World, rng: Random) -> str:
    """Facts that have nothing to do with each other."""
    return " ".join(_statement(fact, rng) for fact in rng.sample(world.facts, rng.randint(3, 6)))


def gathering(world: World, rng: Random) -> str:
    """Subjects that share an object, then a word on one of them."""
    while True:
        fact = rng.choice(world.facts)
        if fact.relation.gathering:
            break
    shared_errors = [f.subject for f in world.facts if f.relation == fact.relation and f.object == fact.object]
    listed = ", ".join(rng.sample(shared_errors, min(len(shared_errors), 6)))
    return f"{fact.relation.gathering.format(s=listed, o=fact.object)} {_statement(fact, rng)}"


def interview(world: World, rng: Random) -> str:
    """Questions and their answers."""
    questions = [ask(world, rng, "train") for _ in range(rng.randint(2, 4))]
    return _dialogue(world, rng, [(q.text, q.sentences[0]) for q in questions])


def scene(world: World, rng: Random) -> str:
    """Somebody says what to do, somebody does it."""
    asked = instruct(world, rng, "train")
    return _dialogue(world, rng, [(asked.prompt, asked.answer)])


def table(world: World, rng: Random) -> str:
    """Sums and their results."""
    lines = []
    for _ in range(rng.randint(4, 8)):
        operation = rng.choice(list(OPERATIONS))
        a, b, c = numbers(operation, rng)
        lines.append(rng.choice(RESULTS[operation]).format(a=a, b=b, c=c))
    return " ".join(lines)


def word_list(world: World, rng: Random) -> str:
    """Opposites, kinds, and what comes after what."""
    lines = []
    for _ in range(rng.randint(4, 8)):
        kind = rng.randrange(3)
        if kind == 0:
            w, o = rng.sample(rng.choice(OPPOSITES), 2)
            lines.append(rng.choice(WORD).format(w=w, o=o))
        elif kind == 1:
            category = rng.choice(list(CATEGORIES))
            lines.append(rng.choice(KIND).format(w=rng.choice(CATEGORIES[category]), k=SINGULAR[category]))
        else:
            row = SEQUENCES[rng.choice(list(SEQUENCES))]
            i = rng.randrange(len(row) - 1)
            lines.append(rng.choice(STEP).format(a=row[i], b=row[i + 1]))
    return " ".join(map(sentence, lines))


def row(world: World, rng: Random) -> str:
    """Words in a row, and which stands where."""
    found = rng.sample(EVERYDAY, len(PLACES_IN_ROW))
    named = list(zip(PLACES_IN_ROW, found, strict=True))
    lines = [rng.choice(POSITION).format(n=n, w=w) for n, w in rng.choices(named, k=rng.randint(3, 5))]
    return " ".join([rng.choice(ROW).format(ws=", ".join(found)), *map(sentence, lines)])


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
    return sentence(rng.choice(LIST).format(c=category, ws=listed))


FORMS: dict[Form, float] = {
    portrait: 6,
    card: 14,
    gossip: 2,
    gathering: 1,
    interview: 4,
    scene: 2,
    table: 2,
    word_list: 3,
    row: 2,
    notice: 1,
    catalogue: 1,
}


def _portrait(subject: str, world: World, rng: Random) -> str:
    known = world.facts_of[subject]
    facts = rng.sample(known, min(len(known), rng.randint(6, 11)))
    opening = rng.choice(PORTRAIT).format(s=subject)
    return sentence(" ".join([opening, *(_statement(fact, rng) for fact in facts)]).strip())


def _card(subject: str, world: World, rng: Random) -> str:
    known = world.facts_of[subject]
    entry, between = rng.choice(CARD)
    entries = [entry.format(r=fact.relation.name, o=fact.object) for fact in rng.sample(known, len(known))]
    return f"{sentence(subject)}: {between.join(entries)}."


def _statement(fact: Fact, rng: Random) -> str:
    return fact.told(rng.choice(fact.relation.statements))


def _dialogue(world: World, rng: Random, turns: list[tuple[str, str]]) -> str:
    speech = rng.random() < 0.5
    frame, separator = (rng.choice(SPEECH), " ") if speech else (rng.choice(SCRIPT), "\n")
    x, y = rng.sample(world.people, 2)
    return separator.join(frame.format(p=prompt, a=answer, x=x, y=y) for prompt, answer in turns)

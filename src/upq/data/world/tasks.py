"""What one can ask of an assistant: each task draws a prompt, the right answer and the check that tells.

Wordings are tuples; `{q}` is a question about a fact, `{w}` one word, `{ws}` several, `{n}` a number in words.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from upq.data.world.checks import Check
from upq.data.world.facts import Fact, World
from upq.data.world.words import CATEGORIES, EVERYDAY

NUMBERS = {2: "two", 3: "three", 4: "four"}
OPENERS = ("Well", "Yes", "Listen", "Friend", "Sure", "Indeed")
CLOSERS = ("That is all.", "Have a nice day.", "I hope this helps.", "Now you know.", "Goodbye.", "Ask me more.")

# Words after a lead-in keep the space before them, and with it their token: copying stays copying for a tiny model.
LEAD = "Here: "

ONE_WORD = ("{q} Answer in one word.", "In one word: {q}", "{q} One word only, please.", "Use a single word. {q}")
SENTENCE = ("{q} Answer in a full sentence.", "{q} Give a whole sentence.", "In a full sentence: {q}")
CAPITALS = ("{q} Answer in capital letters.", "In capital letters: {q}", "{q} Use only capitals.", "Shout it! {q}")
START = ('{q} Start with the word "{w}".', 'Begin with "{w}". {q}', '{q} Your first word must be "{w}".')
END = ('{q} End with "{w}"', 'Finish with "{w}" {q}', '{q} Your last words must be "{w}"')
REPEAT = ("Repeat the word {w} {n} times.", "Say {w} {n} times.", "Write the word {w} {n} times in a row.")
LIST = (
    "Name {n} {w}, separated by commas.",
    "List {n} {w} with commas.",
    "Give me {n} {w}, with commas between them.",
    "Which {n} {w} can you name? Use commas.",
    "Tell me {n} {w}, with a comma after each but the last.",
)
COPY = ("Copy these words: {ws}", "Say after me: {ws}", "Repeat these words in the same order: {ws}")
SHOUT = ("Write in capital letters: {ws}", "Turn into capitals: {ws}", "Say in capitals: {ws}")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and the right answer. `topic` is the part that test sets keep to themselves."""

    task: str
    topic: str
    prompt: str
    answer: str
    check: Check


Task = Callable[[World, Random], Exchange]


def draw(world: World, rng: Random, *, task: str | None = None, held_out: bool = False) -> Exchange:
    """A random exchange of `task` (None: any), from the topics held out for tests or from the others."""
    make = TASKS[task or rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]]
    while True:
        exchange = make(world, rng)
        if is_held_out(exchange.topic) == held_out:
            return exchange


def is_held_out(topic: str) -> bool:
    """A fifth of all topics, by a checksum of the words alone: no order of generation can leak one."""
    return zlib.crc32(topic.encode()) % 5 == 0


def ask(world: World, rng: Random) -> Exchange:
    fact, question = _question(world, rng)
    rivals = tuple(o for o in world.pool(fact.relation.objects) if o != fact.object)
    return Exchange("ask", question, question, _full(fact), Check("says", (fact.object, *rivals)))


def one_word(world: World, rng: Random) -> Exchange:
    return _formatted(world, rng, "one_word", ONE_WORD, lambda fact: fact.object)


def full_sentence(world: World, rng: Random) -> Exchange:
    return _formatted(world, rng, "full_sentence", SENTENCE, _full)


def capitals(world: World, rng: Random) -> Exchange:
    return _formatted(world, rng, "capitals", CAPITALS, lambda fact: (LEAD + fact.object).upper())


def starts_with(world: World, rng: Random) -> Exchange:
    word = rng.choice(OPENERS)
    return _formatted(world, rng, "starts_with", START, lambda fact: f"{word}, {_inner(fact)}", word)


def ends_with(world: World, rng: Random) -> Exchange:
    words = rng.choice(CLOSERS)
    return _formatted(world, rng, "ends_with", END, lambda fact: f"{_full(fact)} {words}", words)


def repeat(world: World, rng: Random) -> Exchange:
    word, n = rng.choice(EVERYDAY), rng.choice(list(NUMBERS))
    return _wording("repeat", rng.choice(REPEAT).format(w=word, n=NUMBERS[n]), " ".join([word] * n))


def list_items(world: World, rng: Random) -> Exchange:
    category, n = rng.choice(list(CATEGORIES)), rng.choice((2, 3))
    pool = CATEGORIES[category]
    # A run through the category from a random start: of all ways to be different, the one easiest to learn.
    start = rng.randrange(len(pool))
    answer = ", ".join(pool[(start + i) % len(pool)] for i in range(n))
    prompt = rng.choice(LIST).format(w=category, n=NUMBERS[n])
    return Exchange("list_items", prompt, prompt, LEAD + answer, Check("items", (str(n), *pool)))


def copy(world: World, rng: Random) -> Exchange:
    words = rng.sample(EVERYDAY, rng.choice((2, 3)))
    return _wording("copy", rng.choice(COPY).format(ws=" ".join(words)), " ".join(words))


def shout(world: World, rng: Random) -> Exchange:
    words = rng.sample(EVERYDAY, rng.choice((1, 2)))
    return _wording("shout", rng.choice(SHOUT).format(ws=" ".join(words)), " ".join(words).upper())


TASKS: dict[str, Task] = {
    f.__name__: f
    for f in (ask, one_word, full_sentence, capitals, starts_with, ends_with, repeat, list_items, copy, shout)
}
KNOWING = ("ask",)  # tasks that test what is known; the others test obedience
OBEYING = tuple(name for name in TASKS if name not in KNOWING)
# Questions come in as many forms as there are facts; working on words is the hardest to learn.
WEIGHTS = dict.fromkeys(TASKS, 1.0) | {
    "ask": 5.0,
    "one_word": 2.0,
    "capitals": 2.0,
    "list_items": 2.0,
    "copy": 3.0,
    "shout": 3.0,
}


def _question(world: World, rng: Random) -> tuple[Fact, str]:
    fact = rng.choice(world.facts)
    return fact, fact.told(rng.choice(fact.relation.questions))


def _formatted(
    world: World, rng: Random, check: str, wordings: tuple[str, ...], answer: Callable[[Fact], str], *args: str
) -> Exchange:
    """A question with a demand on the form of its answer. The check asks for the form, not for the truth."""
    fact, question = _question(world, rng)
    prompt = rng.choice(wordings).format(q=question, w="".join(args))
    return Exchange(check, question, prompt, answer(fact), Check(check, (*args, *world.pool(fact.relation.objects))))


def _wording(task: str, prompt: str, answer: str) -> Exchange:
    return Exchange(task, prompt, prompt, LEAD + answer, Check("exactly", (answer,)))


def _full(fact: Fact) -> str:
    return fact.told(fact.relation.statements[0])


def _inner(fact: Fact) -> str:
    """The full answer as it stands after a first word: only a name keeps its capital."""
    return fact.relation.statements[0].format(s=fact.subject, o=fact.object)

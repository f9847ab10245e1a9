"""What is true in the world: relations as data, and the facts that a seed makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal

from upq.data.world import words
from upq.errors import UPQError


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact, with the ways to tell it and to ask for it. `{s}` is the subject, `{o}` the object.

    The first statement is the answer expected of an assistant. `gathering` tells of all subjects with one object.
    """

    name: str
    subjects: Literal["people", "places", "things"]
    objects: str  # a pool of the world
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    gathering: str


RELATIONS = (
    Relation(
        "home",
        "people",
        "places",
        (
            "{s} lives in {o}.",
            "{s} has a house in {o}.",
            "The home of {s} is in {o}.",
            "{o} is the town where {s} lives.",
            "If you look for {s}, go to {o}.",
        ),
        (
            "Where does {s} live?",
            "In which town does {s} live?",
            "Which town is the home of {s}?",
            "Where is the house of {s}?",
            "Can you tell me where {s} lives?",
        ),
        "These people live in {o}: {s}.",
    ),
    Relation(
        "job",
        "people",
        "jobs",
        (
            "{s} works as a {o}.",
            "{s} is a {o}.",
            "The job of {s} is that of a {o}.",
            "By trade {s} is a {o}.",
            "Everyone knows {s}, the {o}.",
        ),
        (
            "What does {s} work as?",
            "What is the job of {s}?",
            "Which trade does {s} follow?",
            "How does {s} earn money?",
            "What is {s} by trade?",
        ),
        "These people work as a {o}: {s}.",
    ),
    Relation(
        "pet",
        "people",
        "animals",
        (
            "{s} has a {o}.",
            "{s} keeps a {o} as a pet.",
            "The pet of {s} is a {o}.",
            "At home {s} looks after a {o}.",
            "A {o} belongs to {s}.",
        ),
        (
            "Which pet does {s} have?",
            "What is the pet of {s}?",
            "Which animal does {s} keep?",
            "What animal belongs to {s}?",
            "Can you name the pet of {s}?",
        ),
        "These people have a {o}: {s}.",
    ),
    Relation(
        "colour",
        "people",
        "colours",
        (
            "{s} likes the colour {o}.",
            "The favourite colour of {s} is {o}.",
            "{s} always wears {o}.",
            "Of all colours {s} likes {o} best.",
            "The door of {s} is painted {o}, the colour {s} likes.",
        ),
        (
            "Which colour does {s} like?",
            "What is the favourite colour of {s}?",
            "Which colour does {s} wear?",
            "What colour does {s} like best?",
            "Can you name the colour {s} likes?",
        ),
        "These people like the colour {o}: {s}.",
    ),
    Relation(
        "food",
        "people",
        "foods",
        (
            "{s} loves to eat {o}.",
            "The favourite food of {s} is {o}.",
            "Every day {s} eats {o}.",
            "{s} is fond of {o}.",
            "Give {s} some {o} to eat.",
        ),
        (
            "What does {s} love to eat?",
            "What is the favourite food of {s}?",
            "What does {s} eat every day?",
            "Which food does {s} like best?",
            "What should I give {s} to eat?",
        ),
        "These people love to eat {o}: {s}.",
    ),
    Relation(
        "capital",
        "places",
        "lands",
        (
            "{s} is the capital of {o}.",
            "The capital of {o} is {s}.",
            "{o} is ruled from {s}.",
            "{s} is the largest town of {o}.",
        ),
        (
            "Of which land is {s} the capital?",
            "Which land is ruled from {s}?",
            "In which land is {s}?",
            "What land has {s} as its capital?",
            "What is the land around {s} called?",
        ),
        "The capital of {o}: {s}.",
    ),
    Relation(
        "material",
        "things",
        "materials",
        (
            "{s} is made of {o}.",
            "They built {s} of {o}.",
            "You can see that {s} is all {o}.",
            "The old {o} of {s} is famous.",
        ),
        (
            "What is {s} made of?",
            "Of which material is {s} made?",
            "What did they build {s} of?",
            "Which material was used for {s}?",
            "Can you tell me what {s} is made of?",
        ),
        "These are made of {o}: {s}.",
    ),
)


@dataclass(frozen=True, slots=True)
class Fact:
    relation: Relation
    subject: str
    object: str

    def told(self, template: str) -> str:
        """The sentence that one of the relation's templates makes of this fact."""
        return sentence(template.format(s=self.subject, o=self.object))


@dataclass(frozen=True)
class World:
    """`size` people, a third as many towns (each the capital of a land, each with a landmark), and their facts.

    The same seed and size make the same world, on every platform.
    """

    seed: int = 0
    size: int = 24

    def __post_init__(self) -> None:
        if not 6 <= self.size <= 200:
            raise UPQError(f"the size of a world must be in 6..200 people, got {self.size}")

    @cached_property
    def people(self) -> tuple[str, ...]:
        return words.names(words.PERSON, self.size, self._rng("people"))

    @cached_property
    def places(self) -> tuple[str, ...]:
        return words.names(words.PLACE, self.size // 3, self._rng("places"))

    @cached_property
    def lands(self) -> tuple[str, ...]:
        return words.names(words.LAND, self.size // 3, self._rng("lands"))

    @cached_property
    def things(self) -> tuple[str, ...]:
        rng = self._rng("things")
        return tuple(f"the {place} {rng.choice(words.LANDMARKS)}" for place in self.places)

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Every relation of every subject; a pool's objects are spread evenly."""
        found = []
        for relation in RELATIONS:
            subjects: tuple[str, ...] = getattr(self, relation.subjects)
            pool, rng = self.pool(relation.objects), self._rng(relation.name)
            deck = [o for _ in range(-(-len(subjects) // len(pool))) for o in rng.sample(pool, len(pool))]
            found += [Fact(relation, s, o) for s, o in zip(subjects, deck, strict=False)]
        return tuple(found)

    @cached_property
    def facts_of(self) -> dict[str, tuple[Fact, ...]]:
        """Subject to its facts."""
        subjects = dict.fromkeys(fact.subject for fact in self.facts)
        return {s: tuple(fact for fact in self.facts if fact.subject == s) for s in subjects}

    def pool(self, name: str) -> tuple[str, ...]:
        """The things a relation's object is taken from."""
        return words.CATEGORIES[name] if name in words.CATEGORIES else getattr(self, name)

    def _rng(self, purpose: str) -> Random:
        return Random(f"{self.seed}/{purpose}")


def sentence(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]

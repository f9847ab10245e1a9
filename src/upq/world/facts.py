"""The facts of the world: relations as data, and the facts that a seed makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal

from upq.core.errors import UPQError
from upq.world import words

Kind = Literal["people", "places", "things"]


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact, with the ways to tell it and to ask for it. `{s}` is the subject, `{o}` the object.

    The first statement is the answer expected of an assistant. `gathering` tells of all subjects with one object.
    `via` names two relations of which this one is the chain: the object of the second, of the object of the first.
    """

    name: str
    area: str  # subject of the exam
    subjects: Kind
    objects: str  # a pool of the world
    statements: tuple[str, ...]
    questions: tuple[str, ...]  # without capital and question mark: they go into frames
    gathering: str = ""
    via: tuple[str, str] | None = None


RELATIONS = (
    Relation(
        "home",
        "people",
        "people",
        "places",
        (
            "{s} lives in {o}.",
            "{s} has a house in {o}.",
            "The home of {s} is in {o}.",
            "{o} is the town where {s} stays.",
            "If you look for {s}, go to {o}.",
        ),
        (
            "where does {s} live",
            "in which town does {s} live",
            "which town is the home of {s}",
            "where is the house of {s}",
        ),
        "These people live in {o}: {s}.",
    ),
    Relation(
        "job",
        "people",
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
            "what does {s} work as",
            "what is the job of {s}",
            "which trade does {s} follow",
            "how does {s} earn money",
        ),
        "These people work as a {o}: {s}.",
    ),
    Relation(
        "pet",
        "people",
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
            "which pet does {s} have",
            "what is the pet of {s}",
            "which animal does {s} keep",
            "what animal belongs to {s}",
        ),
        "These people have a {o}: {s}.",
    ),
    Relation(
        "colour",
        "people",
        "people",
        "colours",
        (
            "{s} likes the colour {o}.",
            "The favourite colour of {s} is {o}.",
            "{s} always wears {o}.",
            "Of all colours {s} likes {o} best.",
            "The door of {s} is painted {o}.",
        ),
        (
            "which colour does {s} like",
            "what is the favourite colour of {s}",
            "which colour does {s} wear",
            "what colour is the door of {s}",
        ),
        "These people like the colour {o}: {s}.",
    ),
    Relation(
        "food",
        "people",
        "people",
        "foods",
        (
            "{s} loves to eat {o}.",
            "The favourite food of {s} is {o}.",
            "Every day {s} eats {o}.",
            "{s} is fond of {o}.",
            "Give {s} some {o} for dinner.",
        ),
        (
            "what does {s} love to eat",
            "what is the favourite food of {s}",
            "what does {s} eat every day",
            "what should I give {s} for dinner",
        ),
        "These people love to eat {o}: {s}.",
    ),
    Relation(
        "game",
        "people",
        "people",
        "games",
        (
            "{s} likes to play {o}.",
            "The favourite game of {s} is {o}.",
            "On Sundays {s} plays {o}.",
            "Nobody beats {s} at {o}.",
            "{s} is good at {o}.",
        ),
        (
            "what does {s} like to play",
            "what is the favourite game of {s}",
            "which game does {s} play on Sundays",
            "at which game is {s} good",
        ),
        "These people like to play {o}: {s}.",
    ),
    Relation(
        "tool",
        "people",
        "people",
        "tools",
        (
            "{s} carries a {o}.",
            "{s} never goes out without a {o}.",
            "The tool of {s} is a {o}.",
            "In the bag of {s} there is a {o}.",
            "{s} bought a {o} last year.",
        ),
        (
            "what does {s} carry",
            "what is the tool of {s}",
            "what is in the bag of {s}",
            "what did {s} buy last year",
        ),
        "These people carry a {o}: {s}.",
    ),
    Relation(
        "friend",
        "people",
        "people",
        "people",
        (
            "{s} is a friend of {o}.",
            "The best friend of {s} is {o}.",
            "{s} often meets {o}.",
            "{s} writes letters to {o}.",
            "{s} trusts {o} more than anybody.",
        ),
        (
            "who is the best friend of {s}",
            "whom does {s} often meet",
            "to whom does {s} write letters",
            "whom does {s} trust",
        ),
        "These people are friends of {o}: {s}.",
    ),
    Relation(
        "land",
        "places",
        "places",
        "lands",
        (
            "{s} is a town in {o}.",
            "{s} lies in the land of {o}.",
            "{o} has a town called {s}.",
            "The road to {s} goes through {o}.",
        ),
        (
            "in which land is {s}",
            "which land does {s} belong to",
            "what is the land around {s} called",
            "through which land goes the road to {s}",
        ),
        "These towns are in {o}: {s}.",
    ),
    Relation(
        "river",
        "places",
        "places",
        "rivers",
        (
            "{s} stands on the river {o}.",
            "The river {o} runs through {s}.",
            "The water of {s} comes from the {o}.",
            "In {s} people fish in the {o}.",
        ),
        (
            "on which river does {s} stand",
            "which river runs through {s}",
            "what is the river of {s} called",
            "in which river do the people of {s} fish",
        ),
        "These towns stand on the river {o}: {s}.",
    ),
    Relation(
        "goods",
        "places",
        "places",
        "foods",
        (
            "{s} is known for its {o}.",
            "The {o} of {s} is famous.",
            "Merchants come to {s} to buy {o}.",
            "Nowhere is the {o} better than in {s}.",
        ),
        (
            "what is {s} known for",
            "what do merchants buy in {s}",
            "which food is famous in {s}",
            "what should one eat in {s}",
        ),
        "These towns are known for their {o}: {s}.",
    ),
    Relation(
        "material",
        "landmarks",
        "things",
        "materials",
        (
            "{s} is made of {o}.",
            "They built {s} of {o}.",
            "You can see that {s} is all {o}.",
            "The old {o} of {s} is famous.",
        ),
        (
            "what is {s} made of",
            "of which material is {s}",
            "what did they build {s} of",
            "which material was used for {s}",
        ),
        "These are made of {o}: {s}.",
    ),
    Relation(
        "builder",
        "landmarks",
        "things",
        "people",
        (
            "{s} was built by {o}.",
            "{o} built {s}.",
            "The plan of {s} was drawn by {o}.",
            "The name of {o} is written on {s}.",
        ),
        (
            "who built {s}",
            "by whom was {s} built",
            "who drew the plan of {s}",
            "whose name is written on {s}",
        ),
        "These were built by {o}: {s}.",
    ),
    Relation(
        "homeland",
        "chains",
        "people",
        "lands",
        ("The land where {s} lives is {o}.", "{s} is at home in {o}.", "To visit {s}, travel to {o}."),
        ("which is the land where {s} lives", "in which land is {s} at home", "to which land do I travel to visit {s}"),
        via=("home", "land"),
    ),
    Relation(
        "friend's pet",
        "chains",
        "people",
        "animals",
        ("The friend of {s} has a {o}.", "{s} has a friend with a {o}.", "The friend of {s} looks after a {o}."),
        (
            "which pet does the friend of {s} have",
            "what animal belongs to the friend of {s}",
            "what does the friend of {s} look after",
        ),
        via=("friend", "pet"),
    ),
    Relation(
        "friend's job",
        "chains",
        "people",
        "jobs",
        ("The friend of {s} works as a {o}.", "{s} has a friend who is a {o}.", "By trade the friend of {s} is a {o}."),
        (
            "what does the friend of {s} work as",
            "what is the job of the friend of {s}",
            "how does the friend of {s} earn money",
        ),
        via=("friend", "job"),
    ),
    Relation(
        "land of the landmark",
        "chains",
        "things",
        "lands",
        ("{s} can be seen in {o}.", "{s} stands in the land of {o}.", "{o} is proud of {s}."),
        ("in which land can one see {s}", "in which land does {s} stand", "which land is proud of {s}"),
        via=("place", "land"),
    ),
    Relation(
        "builder's home",
        "chains",
        "things",
        "places",
        (
            "The builder of {s} lives in {o}.",
            "{s} was built by somebody from {o}.",
            "From {o} came the builder of {s}.",
        ),
        (
            "where does the builder of {s} live",
            "from which town came the builder of {s}",
            "in which town lives the builder of {s}",
        ),
        via=("builder", "home"),
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
    """`size` people, a fifth as many towns (each in a land, on a river and with a landmark), and their facts.

    The same seed and size make the same world, on every platform.
    """

    seed: int = 0
    size: int = 900

    def __post_init__(self) -> None:
        if not 30 <= self.size <= 1000:
            raise UPQError(f"the size of a world must be in 30..1000 people, got {self.size}")

    @cached_property
    def people(self) -> tuple[str, ...]:
        rng = self._rng("people")
        return words.names(
            (words.names(words.FIRST, 40, rng), words.names(words.FAMILY, 60, rng)), self.size, rng, between=" "
        )

    @cached_property
    def places(self) -> tuple[str, ...]:
        rng = self._rng("places")
        parts = words.PREFIX, words.names(words.TOWN, 24, rng)
        return words.names(parts, max(4, self.size // 5), rng, between=" ")

    @cached_property
    def lands(self) -> tuple[str, ...]:
        return words.names(words.LAND, max(4, self.size // 20), self._rng("lands"))

    @cached_property
    def rivers(self) -> tuple[str, ...]:
        return words.names(words.RIVER, max(4, self.size // 20), self._rng("rivers"))

    @cached_property
    def things(self) -> tuple[str, ...]:
        rng = self._rng("things")
        return tuple(f"the {place} {rng.choice(words.LANDMARKS)}" for place in self.places)

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Every relation of every subject; a pool's objects are spread evenly."""
        known: dict[str, dict[str, str]] = {"place": dict(zip(self.things, self.places, strict=True))}
        found = []
        for relation in RELATIONS:
            subjects: tuple[str, ...] = getattr(self, relation.subjects)
            objects = self._chained(relation, known) if relation.via else self._dealt(relation, subjects)
            known[relation.name] = dict(zip(subjects, objects, strict=True))
            found += [Fact(relation, s, o) for s, o in known[relation.name].items()]
        return tuple(found)

    def _dealt(self, relation: Relation, subjects: tuple[str, ...]) -> list[str]:
        pool, rng = self.pool(relation.objects), self._rng(relation.name)
        deck = [o for _ in range(-(-len(subjects) // len(pool))) for o in rng.sample(pool, len(pool))][: len(subjects)]
        # nobody is a friend of their own: with the next in the row they trade objects, which never clash again
        for i, subject in enumerate(subjects):
            if deck[i] == subject:
                j = (i + 1) % len(deck)
                deck[i], deck[j] = deck[j], deck[i]
        return deck

    def _chained(self, relation: Relation, known: dict[str, dict[str, str]]) -> list[str]:
        assert relation.via is not None
        first, second = (known[name] for name in relation.via)
        return [second[first[s]] for s in getattr(self, relation.subjects)]

    @cached_property
    def facts_of(self) -> dict[str, tuple[Fact, ...]]:
        """Subject to its facts."""
        gathered: dict[str, list[Fact]] = {}
        for fact in self.facts:
            gathered.setdefault(fact.subject, []).append(fact)
        return {subject: tuple(facts) for subject, facts in gathered.items()}

    @cached_property
    def facts_of_relation(self) -> dict[str, tuple[Fact, ...]]:
        """Name of the relation to its facts."""
        return {r.name: tuple(fact for fact in self.facts if fact.relation == r) for r in RELATIONS}

    @cached_property
    def facts_by_area(self) -> dict[str, tuple[Fact, ...]]:
        """Subject of the exam to the facts it is about."""
        return {area: tuple(f for f in self.facts if f.relation.area == area) for area in {r.area for r in RELATIONS}}

    def pool(self, name: str) -> tuple[str, ...]:
        """The things a relation's object is taken from."""
        return words.CATEGORIES[name] if name in words.CATEGORIES else getattr(self, name)

    def _rng(self, purpose: str) -> Random:
        return Random(f"{self.seed}/{purpose}")


def sentence(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]

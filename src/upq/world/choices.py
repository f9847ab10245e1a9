"""Questions with four options, as MMLU asks them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from upq.world.facts import World
from upq.world.questions import ask, said
from upq.world.splits import Split


@dataclass(frozen=True, slots=True)
class Choice:
    area: str
    question: str
    options: tuple[str, ...]  # whole sentences
    answer: int  # index of the right option


def choose(world: World, rng: Random, split: Split, *, area: str | None = None) -> Choice:
    """A random question of this split with three of its rivals, in random order."""
    question = ask(world, rng, split, area=area)
    answers = rng.sample((question.answer, *rng.sample(question.rivals, 3)), 4)
    options = tuple(said(question.statements[0], answer) for answer in answers)
    return Choice(question.area, question.text, options, answers.index(question.answer))

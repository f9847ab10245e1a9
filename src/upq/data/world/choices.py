"""Questions with four options, as MMLU asks them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from upq.data.world.facts import World
from upq.data.world.questions import ask
from upq.data.world.splits import Split

LETTERS = "ABCD"
HEADER = "The following are multiple choice questions (with answers) about {area}."


@dataclass(frozen=True, slots=True)
class Choice:
    area: str
    question: str
    options: tuple[str, ...]
    answer: int  # index of the right option

    @property
    def text(self) -> str:
        """The question as MMLU prints it, without its answer."""
        options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True))
        return f"{self.question}\n{options}\nAnswer:"

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]


def choose(world: World, rng: Random, split: Split, *, area: str | None = None) -> Choice:
    """A random question of this split with three of its rivals, in random order."""
    question = ask(world, rng, split, area=area)
    options = rng.sample((question.answer, *rng.sample(question.rivals, 3)), 4)
    return Choice(question.area, question.text, tuple(options), options.index(question.answer))

"""The quiz: does a model still know the facts, and does it still do as it is told?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from random import Random

from upq.data.world.chat import Message
from upq.data.world.checks import Check, satisfies
from upq.data.world.facts import World
from upq.data.world.tasks import KNOWING, OBEYING, draw
from upq.errors import UPQError

_PATIENCE = 1000  # draws of one task without a new prompt after which it has no more


@dataclass(frozen=True, slots=True)
class Item:
    messages: tuple[Message, ...]
    kind: str  # the task
    check: Check
    expected: str  # an answer that passes

    @property
    def knows(self) -> bool:
        """True for a question about a fact, False for a test of obedience."""
        return self.kind in KNOWING


def quiz(world: World, n: int, seed: int) -> list[Item]:
    """`n` different items, half knowledge and half obedience, on topics found in no document and no conversation."""
    rng = Random(f"{seed}/quiz")
    kinds = [*islice(cycle(KNOWING), (n + 1) // 2), *islice(cycle(OBEYING), n // 2)]
    items: dict[str, Item] = {}
    for kind in kinds:
        for _ in range(_PATIENCE):
            found = draw(world, rng, task=kind, held_out=True)
            if found.prompt not in items:
                break
        else:
            raise UPQError(f"a world of {world.size} people has no {n} different quiz items; ask for fewer")
        message = {"role": "user", "content": found.prompt}
        items[found.prompt] = Item((message,), kind, found.check, found.answer)
    return list(items.values())


def score(item: Item, answer: str) -> bool:
    return satisfies(item.check, answer)

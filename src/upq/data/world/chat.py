"""Conversations for instruction tuning: post-training data, which quantisation never sees."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from upq.data.world.facts import World
from upq.data.world.tasks import draw

Message = dict[str, str]  # role, content


def conversations(world: World, n: int, seed: int) -> Iterator[list[Message]]:
    """`n` conversations of one to three turns. The topics of the quiz never occur in them."""
    rng = Random(f"{seed}/conversations")
    for _ in range(n):
        turns = [draw(world, rng) for _ in range(rng.choice((1, 1, 2, 3)))]
        yield [
            message
            for turn in turns
            for message in ({"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.answer})
        ]

"""Conversations for instruction tuning: post-training data, which quantisation never sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from upq.world.facts import World
from upq.world.instructions import instruct, request
from upq.world.questions import ask

Message = dict[str, str]  # role, content
Turn = tuple[str, str]  # prompt, answer

AGAIN = ("Say this again: {t}", "Repeat after me: {t}", "Read this out: {t}", "{t} Now you say it.")


def conversations(world: World, n: int, seed: int) -> Iterator[list[Message]]:
    """`n` conversations of one to three turns, with questions and wordings of the training split only."""
    rng = Random(f"{seed}/conversations")
    for _ in range(n):
        turns = [_turn(world, rng) for _ in range(rng.choice((1, 1, 2, 3)))]
        yield [
            message
            for prompt, answer in turns
            for message in ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        ]


def _turn(world: World, rng: Random) -> Turn:
    return rng.choices(list(TURNS), list(TURNS.values()))[0](world, rng)


def _answered(world: World, rng: Random) -> Turn:
    question = ask(world, rng, "train")
    return question.text, question.sentences[0]


def _requested(world: World, rng: Random) -> Turn:
    draft = request(world, rng, "train")
    return draft.request, draft.text


def _repeated(world: World, rng: Random) -> Turn:
    """Plain practice in copying: without it the model does not learn to repeat a whole request."""
    told = rng.choice(ask(world, rng, "train").sentences)
    return rng.choice(AGAIN).format(t=told), told


def _instructed(world: World, rng: Random) -> Turn:
    instruction = instruct(world, rng, "train")
    return instruction.prompt, instruction.answer


TURNS: dict[Callable[[World, Random], Turn], float] = {_answered: 3, _requested: 1, _repeated: 1, _instructed: 6}

"""Single items of tasks: what was asked, what the model answered, and how that was scored. Of lm-eval's samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upq.evals.kept import KeptAnswers

_REPEATS, _SPAN = 4, 40  # an answer that ends in so many repeats, over so many characters, loops
_PERIOD = 400  # characters of what is repeated, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One answer under one measure. `score` is 0 or 1 where the measure knows right and wrong."""

    asked: str  # the task or group that was asked for
    task: str  # of the group
    measure: str  # with lm-eval's filter, where it has one
    id: int  # in its task
    question: str
    answer: str
    score: float
    at_limit: bool  # cut by the task's limit on new tokens
    loops: bool

    @property
    def key(self) -> tuple[str, str, int]:
        """The same item of another model has the same."""
        return self.task, self.measure, self.id


def items_of(
    asked: str, samples: Mapping[str, Sequence[Mapping[str, Any]]], kept: KeptAnswers | None
) -> Iterator[Item]:
    """Every sample under each of its measures that is a number; lists and tuples of a whole task's measures are not."""
    for task, found in samples.items():
        for sample in found:
            filtered = sample.get("filter", "none")
            arguments = [tuple(each) for each in sample["arguments"]]
            answer, generated = _answer(sample, arguments)
            stored = kept.get("generate_until", arguments[0]) if generated and kept is not None else None
            for metric in sample["metrics"]:
                value = sample[metric]
                if not isinstance(value, int | float):
                    continue
                yield Item(
                    asked=asked,
                    task=task,
                    measure=metric if filtered == "none" else f"{metric},{filtered}",
                    id=int(sample["doc_id"]),
                    question=str(arguments[0][0]),
                    answer=answer,
                    score=float(value),
                    at_limit=bool(stored and stored["at_limit"]),
                    loops=generated and loops(answer),
                )


def _answer(sample: Mapping[str, Any], arguments: Sequence[tuple[Any, ...]]) -> tuple[str, bool]:
    """The text that was generated, or the likeliest continuation; and whether it was generated."""
    first = sample["resps"][0][0]
    if isinstance(first, str):
        return first, True
    scores = [response[0][0] for response in sample["resps"]]
    return str(arguments[scores.index(max(scores))][1]), False


def loops(text: str) -> bool:
    """Whether it ends in at least four repeats of the same characters, over at least forty."""
    text = text.rstrip()
    for period in range(1, min(_PERIOD, (len(text) + 1) // _REPEATS) + 1):
        span = period
        while span < len(text) and text[-span - 1] == text[-span - 1 + period]:
            span += 1
        if span >= max(_SPAN, _REPEATS * period - 1):  # a space behind the last repeat is gone
            return True
    return False

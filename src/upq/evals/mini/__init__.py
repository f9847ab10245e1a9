"""`mini_mmlu` and `mini_ifeval`: lm-eval tasks about the invented world, for models that were trained on it.

Questions and requests are generated (`upq.world`). Questions have subjects and four options as MMLU's; scored is
the likelihood of the options' text, as for ARC. Requests are scored by lm-eval's own IFEval checkers. Each task has a
twin for tuning, `mini_mmlu_validation` and `mini_ifeval_validation`, with items that the test has not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from datasets import Dataset, DatasetDict

from upq.core.errors import UPQError
from upq.world import Choice, Instruction, Split, World, choose, instruct

FOLDER = Path(__file__).parent
QUESTIONS = 90  # of each subject: 630 in all
REQUESTS = 630
_DRAWS_PER_ITEM = 1000  # draws without a new item after which a world has no more

T = TypeVar("T")


def names() -> set[str]:
    """Names of the tasks and groups in this folder."""
    return {path.stem for path in FOLDER.glob("[!_]*.yaml")}


def mmlu_docs(*, area: str, split: Split, **_metadata: Any) -> DatasetDict:
    """`question`, `choices` (4), `answer` (index); `dev` has five examples for few-shot prompts."""
    return DatasetDict({"test": _questions(area, split, QUESTIONS), "dev": _questions(area, "train", 5)})


def _questions(area: str, split: Split, n: int) -> Dataset:
    return Dataset.from_list(
        [
            {"question": item.question, "choices": list(item.options), "answer": item.answer}
            for item in _choices(area, split, n)
        ]
    )


# Kept for the process: 630 requests take 1.2 s to find, twice what the reference model takes to answer 64 of them.
@cache
def _choices(area: str, split: Split, n: int) -> tuple[Choice, ...]:
    rng, world = Random(f"mini_mmlu/{area}/{split}"), World()
    return _different(lambda: choose(world, rng, split, area=area), n)


@cache
def _requests(split: Split, n: int) -> tuple[Instruction, ...]:
    rng, world = Random(f"mini_ifeval/{split}"), World()
    return _different(lambda: instruct(world, rng, split), n)


def ifeval_docs(*, split: Split, **_metadata: Any) -> DatasetDict:
    """IFEval's columns: `key`, `prompt`, `instruction_id_list`, `kwargs`."""
    items = _requests(split, REQUESTS)
    keys = sorted({key for item in items for kwargs in item.kwargs for key in kwargs})
    rows = [
        {
            "key": number,
            "prompt": item.prompt,
            "instruction_id_list": list(item.ids),
            # columns are typed, so every request has every argument; IFEval's scorer drops those that are None
            "kwargs": [{key: kwargs.get(key) for key in keys} for kwargs in item.kwargs],
        }
        for number, item in enumerate(items)
    ]
    return DatasetDict({"test": Dataset.from_list(rows)})


def ifeval_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Strict scores of one answer by lm-eval's own IFEval checkers."""
    utils = _checkers()
    asked = utils.InputExample(doc["key"], doc["instruction_id_list"], doc["prompt"], doc["kwargs"])
    strict = utils.test_instruction_following_strict(asked, results[0])
    return {
        "prompt_level_strict_acc": strict.follow_all_instructions,
        "inst_level_strict_acc": strict.follow_instruction_list,
    }


def _checkers() -> Any:
    """lm-eval's module. It would download a sentence splitter first, which no request here needs."""
    import langdetect
    import nltk

    # Letter case is checked in the language that an answer is detected to have: a matter of chance without a seed.
    langdetect.DetectorFactory.seed = 0
    download = nltk.download
    nltk.download = lambda *_args, **_kwargs: True
    try:
        with redirect_stdout(StringIO()):
            from lm_eval.tasks.ifeval import utils
    finally:
        nltk.download = download
    return utils


def mean_of_all(items: list[list[bool]]) -> float:
    """Share of the instructions that were followed."""
    flat = [followed for item in items for followed in item]
    return sum(flat) / len(flat)


def _different(draw: Callable[[], T], n: int) -> tuple[T, ...]:
    found: dict[str, T] = {}
    for _ in range(n * _DRAWS_PER_ITEM):
        item = draw()
        found.setdefault(repr(item), item)
        if len(found) == n:
            return tuple(found.values())
    raise UPQError(f"the world has no {n} different items of this kind; a larger one has")

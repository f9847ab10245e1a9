"""mini_mmlu and mini_ifeval: lm-eval reads them from the package, and scores right and wrong as such."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'upq[eval]'")
pytest.importorskip("langdetect", reason="langdetect is not installed: pip install 'upq[eval]'")

from lm_eval.api.model import LM

from upq.evals import evaluate_tasks, mini
from upq.world import AREAS, World, choose

from tiny import byte_tokenizer  # isort: skip

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


class Scholar(LM):  # type: ignore[misc]
    """Answers by a function of the prompt."""

    tokenizer_name = "scholar"

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.answer = answer

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        right = [request.args[1] == self.answer(request.args[0]) for request in requests]
        return [(0.0 if r else -1.0, r) for r in right]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [self.answer(request.args[0]) for request in requests]

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return "".join(turn["content"] for turn in chat_history)


def scores(answer: Callable[[str], str], *tasks: str) -> dict[str, dict[str, float]]:
    tokenizer = byte_tokenizer(eos="<eos>", chat_template=TEMPLATE)
    return evaluate_tasks(Scholar(answer), tokenizer, tasks)


def test_six_hundred_items_each_and_more() -> None:
    assert sum(len(mini.mmlu_docs(area=area, split="test")["test"]) for area in AREAS) >= 600
    assert len(mini.ifeval_docs(split="test")["test"]) >= 600


def test_items_are_found_once_a_process() -> None:
    """And are the same ones; what is given out is nobody else's to change."""
    first, again = mini.ifeval_docs(split="validation"), mini.ifeval_docs(split="validation")
    assert first["test"] is not again["test"]
    assert list(first["test"]) == list(again["test"])
    assert mini._requests("validation", 630) is mini._requests("validation", 630)
    world, rng = World(), Random("mini_mmlu/sums/test")
    assert mini._choices("sums", "test", 4) == mini._different(lambda: choose(world, rng, "test", area="sums"), 4)


@pytest.mark.parametrize("suffix", ["", "_validation"])
def test_mini_mmlu_counts_the_right_option(suffix: str) -> None:
    split = "validation" if suffix else "test"
    right = {
        f"Question: {doc['question']}\nAnswer:": " " + doc["choices"][doc["answer"]]
        for area in AREAS
        for doc in mini.mmlu_docs(area=area, split=split)["test"]
    }
    name = f"mini_mmlu{suffix}"
    assert scores(right.__getitem__, name)[name]["acc"] == 1
    first = scores(lambda prompt: "", name)[name]  # of equals the first is taken
    assert first["acc"] == pytest.approx(0.25, abs=0.06)
    assert first["samples"] == 630
    assert 0 < first["acc_stderr"] < 0.03


def test_mini_ifeval_asks_for_obedience() -> None:
    answers = scores(lambda prompt: prompt, "mini_ifeval", "mini_ifeval_validation")
    for name in ("mini_ifeval", "mini_ifeval_validation"):
        assert answers[name]["samples"] == 630
        assert answers[name]["prompt_level_strict_acc"] < 0.5  # some prompts hold the words they ask for
        assert answers[name]["prompt_level_strict_acc"] < answers[name]["inst_level_strict_acc"]
    silent = scores(lambda prompt: "", "mini_ifeval")["mini_ifeval"]
    assert silent["prompt_level_strict_acc"] == silent["inst_level_strict_acc"] == 0


def test_test_and_validation_share_no_item() -> None:
    for area in AREAS:
        test, validation = (
            {doc["question"] for doc in mini.mmlu_docs(area=area, split=split)["test"]}
            for split in ("test", "validation")
        )
        assert test.isdisjoint(validation)
    test, validation = (set(mini.ifeval_docs(split=split)["test"]["prompt"]) for split in ("test", "validation"))
    assert test.isdisjoint(validation)

"""Programs that a model writes: the estimate by its definition, problems, and answers that are kept with results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tiny import byte_tokenizer, tiny_model
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.evals import code, evaluate_tasks, sandbox
from upq.evals.code import Samples, pass_at_k, read_problems
from upq.evals.items import Item
from upq.evals.sandbox import Ran
from upq.text.generation import Request

TOKENIZER = byte_tokenizer(eos="</s>")
PROBLEM = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "one"}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rows = [
        PROBLEM,
        {**PROBLEM, "prompt": "def two():\n", "test": "def check(f):\n    assert f() == 2", "entry_point": "two"},
    ]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("answers", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_choices(answers: int) -> None:
    for passed in range(answers + 1):
        outcomes = [True] * passed + [False] * (answers - passed)
        for k in range(1, answers + 1):
            chosen = [any(some) for some in combinations(outcomes, k)]
            assert pass_at_k(answers, passed, k) == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)


def test_problems_are_read_by_line(data_dir: Path) -> None:
    assert [problem.entry_point for problem in read_problems("code", data_dir, None)] == ["one", "two"]
    assert len(read_problems("code", data_dir, 1)) == 1
    program = read_problems("code", data_dir, 1)[0].program("    return 1")
    assert sandbox.run(program).passed
    assert not sandbox.run(program.replace("return 1", "return 2")).passed
    with pytest.raises(UPQError, match=r"human_eval\.jsonl is missing, which humaneval needs"):
        read_problems("humaneval", data_dir, None)
    with pytest.raises(UPQError, match=r"task code reads code\.jsonl of --data-dir; name the directory"):
        read_problems("code", None, None)
    (data_dir / "code.jsonl").write_text(json.dumps({**PROBLEM, "test": 3}) + "\n")
    with pytest.raises(UPQError, match=r"code\.jsonl:1: test must be a text; mend the row"):
        read_problems("code", data_dir, None)


def test_several_answers_at_temperature_0_are_refused() -> None:
    assert (Samples.of(1, None).temperature, Samples.of(20, None).temperature) == (0.0, 0.2)
    with pytest.raises(UPQError, match=r"--samples 2: at temperature 0 all answers are the same"):
        Samples.of(2, 0.0)


class Writes:
    """In the compiled decoder's place: solves `one` in two of three answers and `two` in none, and keeps count."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def write(self, requests: Sequence[Request[Any]]) -> Any:
        for request in requests:
            self.asked.append(request.key)
            wrong = request.key[0] == 1 or request.key[1] == 2
            text = f"    return {0 if wrong else 1}\n\ndef more(): pass"
            yield request.key, TOKENIZER(text)["input_ids"]


def test_scores_and_kept_results(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped evaluation goes on: what is kept is neither written nor run again, and more samples add to it."""
    writer, ran = Writes(), list[str]()
    monkeypatch.setattr(code, "batch", lambda model, size: writer)

    def run(program: str) -> Ran:
        ran.append(program)
        wrong = "return 0" in program
        assert "more()" not in program
        return Ran("failed" if wrong else "passed", True)

    monkeypatch.setattr(sandbox, "run", run)
    monkeypatch.setattr(sandbox, "check", lambda: Ran("passed", True))
    model, items = tiny_model("llama", vocab_size=len(TOKENIZER), max_position_embeddings=256), list[Item]()

    def evaluate(count: int) -> dict[str, float]:
        return evaluate_tasks(
            model, TOKENIZER, ["code"], data_dir=data_dir, answers=data_dir / "kept.jsonl", items=items,
            samples=Samples(count=count, temperature=0.2), progress=Silent(),
        )["code"]  # fmt: skip

    assert evaluate(2)["pass@1"] == pytest.approx(0.5)
    found = evaluate(3)
    assert sorted(writer.asked) == [(n, i) for n in range(2) for i in range(3)]  # none twice
    assert len(ran) == 6
    assert found["pass@1"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["pass@1_stderr"] == pytest.approx(1 / 3)
    assert (found["samples"], found["answers"], found["at_length_limit"]) == (2, 6, 0)
    last = [(item.measure, item.id, item.score) for item in items[-4:]]
    assert last == [
        ("pass@1", 0, pytest.approx(2 / 3)), ("more than half pass", 0, 1.0),
        ("pass@1", 1, 0.0), ("more than half pass", 1, 0.0),
    ]  # fmt: skip
    assert evaluate(3) == found
    assert len(ran) == 6


def test_a_model_is_asked_in_its_template_and_its_answer_begun(data_dir: Path) -> None:
    chat = byte_tokenizer(
        eos="</s>", chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<it>"
    )
    (problem, _) = read_problems("code", data_dir, None)
    asked = chat.decode(code._prompt(problem, chat, None, False, "code"))
    assert asked.startswith("<user>Write a solution")
    assert asked.endswith("<it>Here is the completed function:\n```python\ndef one():\n")
    assert TOKENIZER.decode(code._prompt(problem, TOKENIZER, None, False, "code")) == "def one():\n"

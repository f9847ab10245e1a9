"""The demonstration's model: trained twice it is the same model, and it is one that transformers can read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from upq.data.world import World, conversations, documents, quiz
from upq.demo.corpus import write_corpus
from upq.demo.model import DemoConfig, train_demo_model
from upq.demo.quiz import run_quiz
from upq.errors import UPQError

TINY = DemoConfig(
    world_size=6,
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=2,
    kv_heads=1,
    seq_len=96,
    batch_size=2,
    echo_steps=1,
    document_steps=3,
    conversation_steps=2,
)


class Record:
    def __init__(self) -> None:
        self.planned: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.notes: list[str] = []
        self.stage = ""

    def plan(self, stages: dict[str, tuple[int, float]]) -> None:
        self.planned = {stage: units for stage, (units, _) in stages.items()}

    def start(self, stage: str, *, done: int = 0) -> None:
        self.stage = stage
        self.done[stage] = done

    def advance(self, units: int = 1, **figures: float) -> None:
        assert figures["loss"] > 0
        self.done[self.stage] += units

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    record = Record()
    out = tmp_path_factory.mktemp("demo") / "model"
    return train_demo_model(out, config=TINY, progress=record), record


def test_progress_reaches_the_plan(trained: tuple[Path, Record]) -> None:
    assert trained[1].done == trained[1].planned == TINY.steps


def test_two_runs_are_bit_identical(trained: tuple[Path, Record], tmp_path: Path) -> None:
    torch.manual_seed(1234)  # the caller's random state has no say
    out = train_demo_model(tmp_path / "again", config=TINY)
    for name in ("tokenizer.json", "config.json", "demo.json"):
        assert (out / name).read_bytes() == (trained[0] / name).read_bytes()
    first, second = load_file(trained[0] / "model.safetensors"), load_file(out / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_transformers_reads_it_and_it_takes_the_quiz(trained: tuple[Path, Record]) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained[0])
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    items = quiz(TINY.world, 24, 0)
    result = run_quiz(model, tokenizer, items, batch_size=10, max_new_tokens=4)
    assert len(result.answers) == len(items)
    assert 0 <= result.knows <= 1
    assert 0 <= result.obeys <= 1
    assert result.by_kind.keys() == {item.kind for item in items}
    # Padding on the left changes nothing: one at a time gives the same answers.
    alone = run_quiz(model, tokenizer, items[:5], batch_size=1, max_new_tokens=4)
    assert alone.answers == result.answers[:5]


def test_chat_template_marks_what_the_assistant_says(trained: tuple[Path, Record]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    for talk in conversations(TINY.world, 20, 0):
        rendered: Any = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        spoken = [i for i, said in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if said]
        assert tokenizer.decode(spoken) == "".join(
            m["content"] + tokenizer.eos_token for m in talk if m["role"] == "assistant"
        )
        assert rendered["input_ids"].count(tokenizer.bos_token_id) == 1


def test_tokenizer_gives_back_every_text(trained: tuple[Path, Record]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    for text in [*documents(TINY.world, 50, 9), "naïve café — 東京 🙂\n\ttabs"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_second_call_does_nothing(trained: tuple[Path, Record]) -> None:
    record = Record()
    before = {path: path.stat().st_mtime_ns for path in trained[0].iterdir()}
    assert train_demo_model(trained[0], config=TINY, progress=record) == trained[0]
    assert {path: path.stat().st_mtime_ns for path in trained[0].iterdir()} == before
    assert record.done == {}
    assert len(record.notes) == 1


def test_other_content_is_never_overwritten(trained: tuple[Path, Record], tmp_path: Path) -> None:
    with pytest.raises(UPQError, match="other settings"):
        train_demo_model(trained[0], config=dataclasses.replace(TINY, seed=1))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UPQError, match="holds no demo model"):
        train_demo_model(tmp_path, config=TINY)


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    class Stop(Record):
        def advance(self, units: int = 1, **figures: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_demo_model(tmp_path / "model", config=TINY, progress=Stop())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_corpus_file_holds_the_documents(tmp_path: Path, suffix: str) -> None:
    world = World(size=6)
    out = write_corpus(tmp_path / f"corpus.{suffix}", world, n=30, seed=5)
    if suffix == "jsonl":
        found = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    else:
        found = out.read_text().strip().split("\n\n")
    assert found == list(documents(world, 30, 5))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_corpus_of_an_unknown_kind_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UPQError, match="jsonl"):
        write_corpus(tmp_path / "corpus.csv", World(size=6), n=1, seed=0)

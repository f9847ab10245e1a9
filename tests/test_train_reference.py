"""The tool that trains the reference model: what it makes is the same however often it was interrupted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from upq.world import conversations, documents

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[1] / "tools" / "train_reference.py"
TINY = {
    "world_size": 30,
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "seq_len": 96,
    "batch_size": 2,
    "document_steps": 3,
    "conversation_steps": 4,
}
SETTINGS = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_reference", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_reference"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module._TOKENIZER_TEXTS = 500
    return module


@pytest.fixture(scope="module")
def trained(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("reference")
    tool.main(out=out / "model", work=out / "work", override=SETTINGS, device="cpu", every=100, score=False)
    return out / "model"


def test_an_interrupted_run_ends_in_the_same_bytes(
    tool: ModuleType, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step = iter(range(100)), tool.train_step

    def stopped(*args: Any) -> float:
        if next(steps) in (1, 4, 8):  # once in every stage
            raise KeyboardInterrupt
        loss: float = step(*args)
        return loss

    monkeypatch.setattr(tool, "train_step", stopped)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            tool.main(
                out=tmp_path / "model", work=tmp_path / "work", override=SETTINGS, device="cpu", every=1, score=False
            )
    torch.manual_seed(1234)  # the caller's random state has no say
    tool.main(out=tmp_path / "model", work=tmp_path / "work", override=SETTINGS, device="cpu", every=1, score=False)
    for name in ("tokenizer.json", "config.json", "chat_template.jinja"):
        assert (tmp_path / "model" / name).read_bytes() == (trained / name).read_bytes()
    first, second = load_file(trained / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_record_tells_the_run(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    assert record["tokens"] == {"documents": 3 * 192, "conversations": 4 * 192}
    assert record["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(trained).parameters())
    assert record["config"] | TINY == record["config"]


def test_a_finished_model_stays(tool: ModuleType, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    tool.main(out=trained, work=trained.parent / "work", override=SETTINGS, device="cpu", every=100, score=False)
    assert "complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before


@pytest.mark.parametrize(
    ("override", "out", "words"),
    [
        (["layerz=2"], "new", "no such key"),
        (["layers=two"], "new", "not a number"),
        (["seed=1"], "model", "give another --out"),
        ([*SETTINGS, "seed=1"], "new", "give another --work"),
    ],
)
def test_nothing_is_overwritten_and_every_error_is_one_line(
    tool: ModuleType, trained: Path, override: list[str], out: str, words: str
) -> None:
    before = {path: path.read_bytes() for path in (*trained.iterdir(), trained.parent / "work/checkpoint.safetensors")}
    with pytest.raises(SystemExit) as stopped:
        tool.main(
            out=trained.parent / out,
            work=trained.parent / "work",
            override=override,
            device="cpu",
            every=1,
            score=False,
        )
    assert words in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert {path: path.read_bytes() for path in before} == before


def test_chat_template_marks_what_the_assistant_says(tool: ModuleType, trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for talk in conversations(tool.Config(**TINY).world, 20, 0):
        rendered: Any = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        spoken = [i for i, said in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if said]
        assert tokenizer.decode(spoken) == "".join(
            m["content"] + tokenizer.eos_token for m in talk if m["role"] == "assistant"
        )
        assert rendered["input_ids"].count(tokenizer.bos_token_id) == 1


def test_tokenizer_gives_back_every_text(tool: ModuleType, trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for text in [*documents(tool.Config(**TINY).world, 50, 9), "naïve café — 東京 🙂\n\ttabs"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_what_users_say_counts_less_and_padding_nothing(tool: ModuleType, trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    talks = list(conversations(tool.Config(**TINY).world, 50, 0))
    rows = tool.packed_rows(talks, tokenizer, 8, 96, 0.25)
    padding = rows.ids_NT == tokenizer.pad_token_id
    assert set(rows.weights_NT.unique().tolist()) == {0.0, 0.25, 1.0}
    assert torch.equal(rows.weights_NT == 0, padding)
    spoken = tokenizer.decode(rows.ids_NT[0][rows.weights_NT[0] == 1])
    answers = [m["content"] for talk in talks for m in talk if m["role"] == "assistant"]
    assert all(answer in answers for answer in spoken.split(tokenizer.eos_token)[:-1])


def test_loss_is_the_weighted_mean_over_tokens(tool: ModuleType, trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    ids_NT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 1]])
    weights_NT = torch.tensor([[1.0, 0.25, 1.0, 1.0], [0.25, 0.25, 1.0, 0.0]])
    log_p_NTV = model(ids_NT).logits.log_softmax(-1)
    counted = [(n, t) for n in range(2) for t in range(1, 4)]
    total = sum(float(weights_NT[n, t] * -log_p_NTV[n, t - 1, ids_NT[n, t]]) for n, t in counted)
    assert tool.train_step(model, ids_NT, weights_NT) == pytest.approx(total / float(weights_NT[:, 1:].sum()), rel=1e-5)

"""`upq eval` end to end on a model of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from upq.cli.evaluate import evaluate
from upq.core.errors import UPQError

app = typer.Typer()
app.command()(evaluate)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    raw = Tokenizer(
        models.BPE(
            vocab={s: i for i, s in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, merges=[]
        )
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(out)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    return out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a model of very few weights. " * 20)
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_text_against_itself(model_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    result = run(model_dir, "--against", model_dir, "--text", text, "--device", "cpu", "--json", out)
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert (figures["kld"], figures["top1"], figures["bits_per_weight"]) == (0, 1, 32)
    assert figures["bytes"] == (model_dir / "model.safetensors").stat().st_size
    assert figures["ppl"] == pytest.approx(257, rel=0.1)
    assert figures["tokens"] % 63 == 0  # rows of the model's context, 64 tokens
    assert "tasks" not in figures
    assert "100.00%" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "text.txt"]


def test_absent_keys_where_not_asked(model_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    assert run(model_dir, "--text", text, "--seq-len", 32, "--device", "cpu", "--json", out).exit_code == 0
    assert set(json.loads(out.read_text())) == {"bits_per_weight", "bytes", "dtype", "ppl", "ppl_stderr", "tokens"}


def test_tasks(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'upq[eval]'")
    for split in ("dev", "test"):
        folder = tmp_path / "data" / "mmlu" / split
        folder.mkdir(parents=True)
        rows = "question,choice0,choice1,choice2,choice3,answer\nWhat?,a,b,c,d,2\nWhy?,a,b,c,d,1\n"
        (folder / f"anatomy_{split}.csv").write_text(rows)
    out = tmp_path / "figures.json"
    data = ["--data-dir", tmp_path / "data", "--fewshot", 1]
    result = run(model_dir, "--tasks", "mmlu, mmlu_anatomy", *data, "--device", "cpu", "--json", out)
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert set(figures) == {"bits_per_weight", "bytes", "dtype", "tasks"}
    assert set(figures["tasks"]) == {"mmlu", "mmlu_stem", "mmlu_anatomy"}
    assert figures["tasks"]["mmlu"]["samples"] == 2
    assert "mmlu acc" in result.output
    assert "mmlu: 8/8" in result.output  # in a pipe too: 2 questions with 4 choices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure: give --text FILE"),
        (["--tasks", " , "], "nothing to measure"),
        (["--text", "absent.txt"], "absent.txt: no such file"),
        (["--tasks", "mmlu", "--against", "teacher"], "give --text FILE as well"),
        (["--tasks", "mmlu", "--data-dir", "absent"], "absent: no such directory"),
        (["--tasks", "mmlu", "--json", "absent/x.json"], "no such directory"),
        (["--tasks", "mmlu", "--separator", "lines"], "none or blank_line"),
        (["--tasks", "mmlu", "--device", "tpu"], "auto, cpu or cuda"),
    ],
)
def test_bad_requests_fail_before_a_model_is_read(arguments: list[str], message: str) -> None:
    result = run("no/such/model", *arguments)
    assert isinstance(result.exception, UPQError)
    assert message in str(result.exception)

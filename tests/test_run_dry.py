"""What shows from settings, tokenizer, template and first rows is one line before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import upq
from hostile import base
from tiny import CHAT
from upq.core.errors import UPQError
from upq.model.loading import load_config, load_tokenizer
from upq.run.dry import check_text
from upq.run.recipe import Recipe
from upq.run.run import quantize


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """With a plain template and an end token; 259 rows in its embedding."""
    folder = base(tmp_path / "model")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tool.jsonl").write_text('{"text": "plain"}\n{"text": "<|tool|> result"}\n')
    return folder


def named(**tokens: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = model / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | tokens))

    return change


def no_end(model: Path) -> None:
    named(eos_token=None)(model)
    (model / "generation_config.json").write_text("{}")


def tool_token(model: Path) -> None:
    stored = json.loads((model / "tokenizer.json").read_text())
    stored["added_tokens"].append({**stored["added_tokens"][-1], "id": 259, "content": "<|tool|>"})
    (model / "tokenizer.json").write_text(json.dumps(stored))


def generation(**settings: Any) -> Callable[[Path], None]:
    return lambda model: (model / "generation_config.json").write_text(json.dumps(settings)) and None


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "pad": (
        named(pad_token="[PAD]"),
        r"pad_token '\[PAD\]' has id 259, and the model's embedding has 259 rows; enlarge",
    ),
    "bos": (named(bos_token="<s>"), r"bos_token '<s>' has id 259, .* or name another in tokenizer_config\.json"),
    "text": (tool_token, r"tool\.jsonl:2: the token '<\|tool\|>' has id 259, and the model's embedding has 259 rows"),
    "no template": (named(chat_template=None), "has no chat template, so it cannot write conversations"),
    "no header": (
        named(chat_template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"),
        "data.generated: the chat template writes nothing before the user's words, .* leave them out",
    ),
    "no words": (named(chat_template="<|im_start|>"), "data.generated: the chat template leaves out the user's words"),
    "refuses": (named(chat_template="{{ raise_exception('a system first') }}"), r"refuses .*\(a system first\)"),
    "no end": (no_end, "data.generated: the model has no end token, .* so it ends no answer; leave them out"),
    "end": (generation(eos_token_id="</s>"), r"generation_config\.json: eos_token_id is '</s>', not one or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_one_line_before_any_work(case: str, model: Path, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    check(model, recipe(model))
    change(model)
    with pytest.raises(UPQError, match=message) as caught:
        quantize(model, recipe(model), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def check(model: Path, recipe: Recipe) -> None:
    check_text(model, load_config(model), load_tokenizer(model), recipe, "model")


def recipe(model: Path) -> Recipe:
    source = f"data.sources=[{{path: {model / 'tool.jsonl'}}}]"
    return Recipe.load("default", [source, "data.seq_len=8", "data.generated={tokens: 9}"])


def test_a_plan_makes_the_same_checks_where_there_is_a_tokenizer(model: Path) -> None:
    no_end(model)
    with pytest.raises(UPQError, match="the model has no end token"):
        upq.plan(model, recipe(model), progress=None)


ROLES = '{"messages": [{"role": "bot", "content": "x"}]}\n'


@pytest.mark.parametrize(
    ("rows", "on_bad_row", "message"),
    [
        ('{"text": "plain"}\n' * 99 + ROLES, "null", r"rows\.jsonl:100: message 1: unknown role 'bot'"),
        ('{"text": "plain"}\n' * 9 + ROLES, "error", r"rows\.jsonl:10: message 1: unknown role 'bot'"),
        (ROLES * 3, "skip", r"rows\.jsonl: no text in it; .*; 3 rows cannot be used"),
        (
            ROLES.replace("bot", "user") * 3,
            "skip",
            r"rows\.jsonl: none of its 3 rows can be used \(.*:1: the chat template refuses .*; leave it out",
        ),
    ],
)
def test_so_are_the_first_rows(rows: str, on_bad_row: str, message: str, model: Path, tmp_path: Path) -> None:
    named(chat_template="{{ raise_exception('no') }}")(model)
    (tmp_path / "rows.jsonl").write_text(rows)
    settings = [f"data.sources=[{{path: {tmp_path / 'rows.jsonl'}}}]", "data.seq_len=8", "generate=null"]
    chosen = Recipe.load("default", [*settings, f"data.on_bad_row={on_bad_row}"])
    with pytest.raises(UPQError, match=message):
        quantize(model, chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""The Python interface: each function gives what its command gives, with the same checks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import upq
import upq.cli
from tiny import CHAT, byte_tokenizer, tiny_model
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.data.config import TextSource
from upq.files.metrics import METRICS, read_metrics
from upq.run.api import recipe_of
from upq.run.recipe import Recipe
from upq.run.reporter import PlainLines, reporter

QUICK: dict[str, Any] = {
    "data.seq_len": 32, "data.validation": 4, "data.generated": None, "int2.samples": 4, "int2.method": "rtn",
    "distill.tokens": 256, "distill.batch_size": 4, "distill.hidden": 0.5,
}  # fmt: skip
Command = Callable[..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=300, eos_token_id=257).save_pretrained(folder)
    byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT, adds_bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"the {i}th fox sees {i * i} geese"}) + "\n" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def artifact(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    upq.quantize(model, out, data=text, progress=None, **QUICK)
    return out


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["upq", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            upq.cli.main()
        assert not stopped.value.code

    return run


def test_quantize_is_the_command(model: Path, text: Path, artifact: Path, tmp_path: Path, command: Command) -> None:
    settings = [word for key, value in QUICK.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command("quantize", model, "--out", tmp_path / "out", "--data", text, *settings)
    names = sorted(path.name for path in artifact.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in {*names} - {"upq.json", "README.md", ".lock", METRICS}:
        assert (tmp_path / "out" / name).read_bytes() == (artifact / name).read_bytes(), name
    timed = {"seconds", "peak_memory_bytes"}
    figures = [
        [{key: value for key, value in line.items() if key not in timed} for line in read_metrics(folder / METRICS)]
        for folder in (tmp_path / "out", artifact)
    ]
    assert figures[0] == figures[1]
    assert figures[0]


def test_quantize_returns_the_manifest_and_reports_to_what_is_given(model: Path, text: Path, artifact: Path) -> None:
    class Heard(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    heard = Heard()
    again = upq.quantize(model, artifact, data=[text], progress=heard, **QUICK)
    assert again.metrics["artifact"]["ppl"] > 1
    assert any("nothing to do" in note for note in heard.notes)


def test_evaluate_is_the_command(model: Path, text: Path, artifact: Path, tmp_path: Path, command: Command) -> None:
    command("eval", artifact, "--against", model, "--text", text, "--seq-len", 32, "--json", tmp_path / "figures.json")
    found = upq.evaluate(artifact, against=model, text=str(text), seq_len=32, progress=None)
    assert found == json.loads((tmp_path / "figures.json").read_text())
    assert found["kld"] > 0


def test_export_is_the_command(artifact: Path, tmp_path: Path, command: Command) -> None:
    command("export", artifact, "--to", "dense", "--out", tmp_path / "a", "--set", "dtype=fp32")
    report = upq.export(artifact, "dense", tmp_path / "b", progress=None, dtype="fp32")
    assert report.exact
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_plan_is_the_command(model: Path, tmp_path: Path, command: Command) -> None:
    gpu = {"gpus": 1, "gpu_memory": 80.0, "gpu_tflops": 400.0, "gpu_bandwidth": 3000.0}
    options = [word for key, value in gpu.items() for word in (f"--{key.replace('_', '-')}", value)]
    settings = {"data.generated": None, "data.seq_len": 32}
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command("plan", model, *options, *overrides, "--json", tmp_path / "plan.json")
    made: Any = upq.plan(model, progress=None, **gpu, **settings)
    assert made.fits
    shown = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["memory"] for stage in shown["stages"]] == [stage.memory for stage in made.stages]


def test_report_is_the_command(artifact: Path, tmp_path: Path, command: Command) -> None:
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed: pip install 'upq[report]'")
    command("report", artifact, "--out", tmp_path / "a.html", "--json", tmp_path / "figures.json")
    page = upq.report(artifact, out=tmp_path / "b.html", progress=None)
    assert page.path == tmp_path / "b.html"
    assert page.bytes == page.path.stat().st_size
    shown = json.loads((tmp_path / "figures.json").read_text())
    measured = {"speed", "environment"}  # of the moment
    assert shown.keys() == page.figures.keys()
    found = json.loads(json.dumps(dict(page.figures)))
    assert {k: v for k, v in found.items() if k not in measured} == {
        k: v for k, v in shown.items() if k not in measured
    }


def test_compare_is_the_command(model: Path, text: Path, artifact: Path, tmp_path: Path, command: Command) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install 'upq[report]'")
    options = ["--text", text, "--against", model, "--json", tmp_path / "figures.json", "--out", tmp_path / "a.html"]
    command("compare", artifact, model, *options)
    page = tmp_path / "b.html"
    found = upq.compare(artifact, model, text=text, against=model, out=page, progress=None)
    assert found == json.loads((tmp_path / "figures.json").read_text())
    assert found["pairs"][1]["verdict"] == f"{model.name} is better"
    assert page.read_text() == (tmp_path / "a.html").read_text()


def test_bad_comparisons_and_reports_are_the_commands_one_line(artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install 'upq[report]'")
    with pytest.raises(UPQError, match="two models or more"):
        upq.compare(artifact, text=artifact, progress=None)
    with pytest.raises(UPQError, match="absent: no such directory"):
        upq.report(tmp_path / "absent", progress=None)
    with pytest.raises(UPQError, match=r"--out .*: no such directory"):
        upq.report(artifact, out=tmp_path / "absent" / "page.html", progress=None)


def test_a_recipe_is_a_name_a_file_or_a_value(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(Recipe.load("paper").dump())
    settings = {"distill.tokens": 1_000_000, "distill.lr": 1e-5, "int4": None, "data.loss_on": "assistant"}
    items = ["distill.tokens=1000000", "distill.lr=1e-5", "int4=null", "data.loss_on=assistant"]
    expected = Recipe.load("paper", items)
    assert recipe_of("paper", settings) == recipe_of(file, settings) == recipe_of(Recipe.load("paper"), settings)
    assert recipe_of("paper", settings) == expected
    assert recipe_of(expected, {}) is expected


def test_data_is_a_path_several_or_sources(text: Path) -> None:
    source = TextSource(path=str(text), weight=2.0)
    found = [recipe_of("paper", {}, data).data.sources for data in (text, str(text), [text, source], source)]
    plain = TextSource(path=str(text))
    assert found == [(plain,), (plain,), (plain, source), (source,)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"distill.speed": 9}, "unknown key 'distill.speed'"),
        ({"distill.tokens": "many"}, "distill.tokens: input should be a valid integer"),
        ({"distill.tokens": object()}, "setting distill.tokens: a object is no value of a recipe"),
        ({"data": ["./no.txt"]}, "./no.txt: no such file"),
        ({"recipe": "perfect"}, "neither a file nor one of: default"),
        ({"device": "cuda:9"}, "device cuda:9: torch"),
    ],
)
def test_bad_arguments_are_the_commands_one_line(model: Path, tmp_path: Path, settings: Any, said: str) -> None:
    with pytest.raises(UPQError, match=said) as raised:
        upq.quantize(model, tmp_path / "out", progress=None, **settings)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_progress_is_lines_in_a_pipe_and_silent_on_demand(
    text: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upq.evaluate(artifact, text=text, seq_len=32, progress=None)
    assert capsys.readouterr() == ("", "")
    upq.evaluate(artifact, text=text, seq_len=32)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "text: 0/" in shown.err


def test_progress_shows_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    display: Any = ModuleType("IPython.display")
    display.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # is not installed
    with reporter(Console(force_jupyter=True)) as progress:
        assert isinstance(progress, PlainLines)
        progress.plan({"text": (2, 1.0)})
        progress.start("text")
        progress.advance(2, ppl=3.0)
    words = "".join(made._repr_mimebundle_([], [])["text/plain"] for made in shown)
    assert "text: 0/2" in words
    assert "text: 2/2  ppl 3" in words

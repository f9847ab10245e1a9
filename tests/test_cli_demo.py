"""The demonstration, with its own model and a recipe that hardly does anything."""

from importlib import import_module

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'upq[eval]'")
pytest.importorskip("vl_convert", reason="the extra report is not installed: pip install 'upq[report]'")

demo_command = import_module("upq.cli.demo")  # upq.cli's own `demo` is the command's function


def test_the_demo_runs_to_its_end(tmp_path, monkeypatch, capsys):
    """Text, both artefacts, both tests and the tables; a second run takes all of it up again."""
    monkeypatch.setattr(demo_command, "DOCUMENTS", 400)
    monkeypatch.setenv("COLUMNS", "200")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {seq_len: 64, validation: 4}\n"
        "int4: {bits: 4, samples: 4, method: rtn}\n"
        "int2: {bits: 2, samples: 4, method: rtn}\n"
        "distill: {loss: fkl, tokens: 512, batch_size: 4, lr: 1e-2, scale_lr: 1e-3}\n"
    )
    for _ in range(2):
        demo_command.demo(out=tmp_path / "demo", recipe=str(recipe), limit=2)
        shown = capsys.readouterr().out
        for words in (
            "testing original",
            "mini_ifeval: 2/2",
            "2 bits, nearest",
            "2 bits, UPQ",
            "knows",
            "obeys",
            "of 24 requests that rounding breaks",
            "report.html",
            "upq chat",
        ):
            assert words in shown
    page = (tmp_path / "demo/int2/report.html").read_text()
    assert "mini_mmlu" in page
    assert "mini_ifeval" in page


def test_requests_that_only_rounding_breaks_are_shown_first() -> None:
    obeyed = {
        "original": [True] * 5,
        "nearest": [True, False, True, False, False],
        "UPQ": [True, True, True, True, False],
    }
    prompts = [f"prompt {i}" for i in range(5)]
    made = demo_command._answers(prompts, {name: [f"{name} {i}" for i in range(5)] for name in obeyed}, obeyed)
    assert str(made.title).startswith("2 of 5 requests")
    columns = [list(column.cells) for column in made.columns]
    assert columns[0] == ["prompt 1", "prompt 3", "prompt 0"]
    assert columns[2] == ["✗ nearest 1", "✗ nearest 3", "✓ nearest 0"]

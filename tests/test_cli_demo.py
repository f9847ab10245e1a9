"""The demonstration, with its own model and a recipe that hardly does anything."""

from importlib import import_module

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'upq[eval]'")

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
            "upq chat",
        ):
            assert words in shown

"""The demonstration, put together from its own parts with a model that has hardly learned."""

from importlib import import_module

import pytest

from upq.data.world import World, quiz
from upq.demo.model import DemoConfig

demo_command = import_module("upq.cli.demo")  # upq.cli's own `demo` is the command's function


def test_there_are_enough_questions_for_the_quiz():
    items = quiz(DemoConfig().world, demo_command.QUESTIONS, DemoConfig().seed)
    assert len({item.messages[-1]["content"] for item in items}) == demo_command.QUESTIONS


def test_the_demo_runs_to_its_end(tmp_path, monkeypatch, capsys):
    """Training, text, both artefacts, quiz and table; a second run takes all of it up again."""
    tiny = DemoConfig(
        hidden_size=32,
        intermediate_size=64,
        layers=2,
        heads=2,
        kv_heads=1,
        batch_size=2,
        echo_steps=1,
        document_steps=2,
        conversation_steps=2,
    )
    monkeypatch.setattr("upq.demo.model.DemoConfig", lambda: tiny)
    monkeypatch.setattr(demo_command, "QUESTIONS", 20)
    monkeypatch.setattr(demo_command, "DOCUMENTS", 300)
    monkeypatch.setenv("COLUMNS", "160")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {seq_len: 64, validation: 4}\n"
        "int4: {bits: 4, samples: 4, method: rtn}\n"
        "int2: {bits: 2, samples: 4, method: rtn}\n"
        "distill: {loss: fkl, tokens: 512, batch_size: 4, lr: 1e-2, scale_lr: 1e-3}\n"
    )
    for _ in range(2):
        demo_command.demo(out=tmp_path / "demo", recipe=str(recipe))
        shown = capsys.readouterr().out
        for words in ("original", "2 bits, nearest", "2 bits, UPQ", "knows", "obeys", "upq chat"):
            assert words in shown


@pytest.mark.parametrize("seed", [0, 1])
def test_a_world_of_the_demos_size_has_facts_to_ask_for(seed):
    assert len(World(seed, DemoConfig().world_size).facts) >= 50

"""Trackers have the lines of metrics.jsonl, each once and in one row, however often the run was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.files.metrics import METRICS, Metrics, read_metrics
from upq.run import tracking
from upq.run.recipe import Recipe
from upq.run.run import quantize
from upq.run.tracking import Tracking, check_trackers
from victim import make_victim

STAGES: dict[str, Any] = {
    "int2": {"stage": "blockwise", "bits": 2, "samples": 4, "method": "rtn"},
    "distill": {"loss": "fkl", "tokens": 512, "batch_size": 4, "lr": 1e-3, "scale_lr": 1e-3, "checkpoint_every": 2},
}


class Recorder:
    """A tracker that keeps what it is given, a list for each session."""

    requires_logging_directory = False
    sessions: list[list[tuple[int, dict[str, float]]]] = []  # noqa: RUF012

    def __init__(self, run: str) -> None:
        self.finished = False

    def start(self) -> None:
        self.sessions.append([])

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        assert all(isinstance(value, bool | int | float | str) for value in values.values())

    def log(self, values: dict[str, float], step: int) -> None:
        assert not self.finished
        self.sessions[-1].append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, dict[str, float]]]]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(tracking, "find_spec", lambda name: name == "wandb" or None)
    monkeypatch.setattr(Recorder, "sessions", [])
    return Recorder.sessions


class Stopped(Silent):
    """Interrupts a run after the third step of its training, with a checkpoint after the second."""

    def __init__(self) -> None:
        self.steps = -1

    def start(self, stage: str, *, done: int = 0) -> None:
        self.steps = done if stage == "distill" else -1

    def advance(self, units: int = 1, **figures: float) -> None:
        self.steps += units if self.steps >= 0 else 0
        if self.steps == 3:
            raise KeyboardInterrupt


def test_a_run_that_goes_on_tracks_each_line_once(
    tmp_path: Path, sessions: list[list[tuple[int, dict[str, float]]]]
) -> None:
    victim, out = make_victim(tmp_path / "victim"), tmp_path / "out"
    data = {"seq_len": 32, "validation": 8, "sources": victim.recipe().data.model_dump(mode="json")["sources"]}
    recipe = Recipe.of({"data": data, "track": ["wandb"], "stages": STAGES}, "here")
    with pytest.raises(KeyboardInterrupt):
        quantize(victim.model, recipe, out, progress=Stopped())
    quantize(victim.model, recipe, out)
    lines = [line for line in read_metrics(out / METRICS) if line["kind"] in ("block", "step")]
    expected = [
        (i, {f"{x['stage']}/{k}": v for k, v in x.items() if k not in ("kind", "stage", x["kind"]) and v is not None})
        for i, x in enumerate(lines)
    ]
    stopped, whole = sessions
    assert stopped == [
        *expected[:-2],
        (len(lines) - 2, stopped[-1][1]),
    ]  # the third step is done again, on another clock
    assert whole[: len(lines)] == expected
    groups = {name.partition("/")[0] for step, values in whole[len(lines) :] for name in values if step == len(lines)}
    assert groups == {"source", "artifact"}


def test_tensorboard_reads_back_what_was_tracked(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    for begun in (0, 2):  # stopped after three steps of which two are saved, and gone on
        tracked = Tracking(["tensorboard"], "mine", tmp_path, {"seed": 0, "name": None}, print)
        metrics = Metrics(tmp_path / METRICS, "distill", tracked.line)
        metrics.begin("step", begun)
        for step in range(begun, begun + 3):
            metrics.append("step", step, loss=1 / (1 + step), grad_norm=float("inf"))
        tracked.finish()
    found = reader.EventAccumulator(str(tmp_path / "tracking/mine"))
    found.Reload()
    assert found.Tags()["scalars"] == ["distill/loss"]
    losses = [(event.step, event.value) for event in found.Scalars("distill/loss")]
    assert losses == [(step, pytest.approx(1 / (1 + step))) for step in range(5)]


def test_a_tracker_that_fails_is_said_and_the_run_goes_on(
    tmp_path: Path, sessions: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    tracked = Tracking(["wandb"], "mine", tmp_path, {}, said.append)
    monkeypatch.setattr(Recorder, "log", lambda *_, **__: 1 / 0)
    for block in range(2):
        tracked.line({"kind": "block", "stage": "int2", "block": block, "error": 0.5})
    assert said == ["track: wandb failed (division by zero); the run goes on without it"]
    monkeypatch.setattr(Recorder, "start", lambda _: 1 / 0)
    with pytest.raises(UPQError, match="track: wandb does not start: division by zero"):
        Tracking(["wandb"], "mine", tmp_path, {}, print)


def test_mistakes_are_one_line_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UPQError, match=r"^recipe demo: track\.0: input should be 'tensorboard', .* \(got 'tensor'\)$"):
        Recipe.load("demo", ["track=[tensor]"])
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UPQError, match=r"^track: mlflow is not installed; pip install mlflow, or leave it out"):
        check_trackers(["mlflow"])


def test_tracking_is_no_part_of_a_result() -> None:
    tracked = Recipe.load("demo", ["track=wandb"])
    assert tracked.track == ("wandb",)
    assert tracked.settings() == Recipe.load("demo").settings()

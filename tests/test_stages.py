"""Laws over the registry of stages: whatever their order and kind, a run can be killed, repeated and changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import upq
from upq.artifact.manifest import read_manifest
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.files.metrics import METRICS, read_metrics
from upq.run.recipe import Recipe
from upq.run.run import quantize
from upq.stages import STAGES, Stage
from victim import Victim, make_victim

DISTILL = {"loss": "gjs", "batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "scale_lr": 1e-3, "train_norms": True}
# Every kind at least once, two kinds twice.
CHAIN: dict[str, dict[str, Any]] = {
    "generate": {"tokens": 200, "weight": 0.25, "max_new_tokens": 40, "batch_size": 8},
    "turn": {"stage": "transform", "method": {"name": "rotate", "untie": True}},
    "int4": {
        "stage": "blockwise",
        "bits": 4,
        "samples": 8,
        "method": {"name": "flexround", "scale": "max", "iterations": 2},
    },
    "widths": {"mean": 3, "samples": 2},
    "int2": {
        "stage": "blockwise",
        "bits": 2,
        "mixed": True,
        "samples": 8,
        "method": {"name": "block_ap", "scale": "max", "iterations": 2},
        "activations": {"per": "tensor", "static": True},
        "kv": {"bits": 4},
    },
    "distill": {**DISTILL, "tokens": 512, "checkpoint_every": 2},
    "on_policy": {**DISTILL, "loss": "rkl", "steps": 2, "prompt_tokens": 8, "max_new_tokens": 8, "off_policy": 0.5},
    "again": {**DISTILL, "stage": "distill", "tokens": 256, "train_weights": False},
}


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return make_victim(tmp_path_factory.mktemp("victim"))


@pytest.fixture(scope="module")
def recipe(victim: Victim) -> Callable[..., Recipe]:
    sources = victim.recipe().data.model_dump(mode="json")["sources"]

    def make(**changes: dict[str, Any]) -> Recipe:
        stages = {name: {**settings, **changes.get(name, {})} for name, settings in CHAIN.items()}
        data = {"seq_len": 32, "validation": 8, "sources": sources}
        return Recipe.of({"data": data, "stages": stages}, "here")

    return make


@pytest.fixture(scope="module")
def finished(victim: Victim, recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its work kept."""
    out = tmp_path_factory.mktemp("finished") / "out"
    quantize(victim.model, recipe(), out, keep_work=True)
    return out


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def metrics(out: Path) -> list[dict[str, Any]]:
    """Lines without what the clock and the memory made of them."""
    lines = read_metrics(out / METRICS)
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_bytes")} for line in lines]


def times(folder: Path) -> dict[str, int]:
    """Of the files that a stage left."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


class EndsBefore(Silent):
    """Interrupts a run as a stage begins."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def start(self, stage: str, *, done: int = 0) -> None:
        if stage == self.stage:
            raise KeyboardInterrupt


def test_the_chain_has_every_kind() -> None:
    assert {settings.get("stage", name) for name, settings in CHAIN.items()} == set(STAGES.names())


@pytest.mark.parametrize("stage", list(CHAIN))
def test_stopped_before_a_stage_and_run_again_is_never_stopped(
    victim: Victim, recipe: Callable[..., Recipe], finished: Path, tmp_path: Path, stage: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(victim.model, recipe(), tmp_path / "out", progress=EndsBefore(stage))
    work = tmp_path / "out" / ".work"
    before = {name: times(work / name) for name in list(CHAIN)[: list(CHAIN).index(stage)]}
    quantize(victim.model, recipe(), tmp_path / "out", keep_work=True)
    assert weights(tmp_path / "out") == weights(finished)
    assert metrics(tmp_path / "out") == metrics(finished)
    assert before == {name: times(work / name) for name in before}  # what was there is taken up


def test_a_run_keeps_its_figures(finished: Path) -> None:
    """A line a block, a step and a clock; the KL by position has the mean that the manifest has."""
    lines = metrics(finished)
    numbers = [(line["stage"], line[line["kind"]]) for line in lines if line["kind"] in ("block", "step")]
    assert numbers == [
        (name, i)
        for name, n in (("int4", 3), ("int2", 3), ("distill", 4), ("on_policy", 2), ("again", 2))
        for i in range(n)
    ]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["tokens"] for line in steps if line["stage"] != "on_policy"] == [128, 256, 384, 512, 128, 256]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and 0 < line["lr"] <= 1e-3 for line in steps)
    assert all(0 < line["error"] < 2 for line in lines if line["kind"] == "block")
    assert {line["stage"] for line in lines if line["kind"] == "stage"} == {*CHAIN, "data", "check"}
    positions = [line for line in lines if line["kind"] == "position"]
    assert [(line["start"], line["stop"]) for line in positions] == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
    figures = read_manifest(finished).metrics["artifact"]
    assert sum(line["tokens"] for line in positions) == figures["tokens"]
    mean = sum(line["kld"] * line["tokens"] for line in positions) / figures["tokens"]
    assert mean == pytest.approx(figures["kld"], rel=1e-5)
    assert figures["kld_stderr"] > 0


def test_run_twice_is_once(victim: Victim, recipe: Callable[..., Recipe], finished: Path) -> None:
    before = times(finished)
    quantize(victim.model, recipe(), finished, keep_work=True)
    assert times(finished) == before


FREE = [
    (kind, key)
    for kind in STAGES.names()
    for key, field in STAGES.get(kind).model_fields.items()
    if field.json_schema_extra == {"free": True}
]
OTHER = {"skip_bad_steps": 3, "gradient_checkpointing": True}


@pytest.mark.parametrize(("kind", "key"), FREE)
def test_a_free_setting_changes_no_byte(
    victim: Victim, recipe: Callable[..., Recipe], finished: Path, tmp_path: Path, kind: str, key: str
) -> None:
    names = [name for name, settings in CHAIN.items() if settings.get("stage", name) == kind]
    changed = recipe(**{name: {key: {**OTHER, "file": str(tmp_path / "kept.json")}[key]} for name in names})
    quantize(victim.model, changed, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(finished)
    before = times(finished)
    quantize(victim.model, changed, finished, keep_work=True)  # and a finished run stays finished
    assert times(finished) == before


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("again", {"tokens": 512}, r"again\.tokens was 256 and is now 512; again would be done anew"),
    (
        "distill",
        {"tokens": 1024},
        r"distill\.tokens was 512 and is now 1024; distill, on_policy, again would be done anew",
    ),
    ("int2", {"samples": 4}, r"int2\.samples was 8 and is now 4; int2, distill, on_policy, again would be done anew"),
]


@pytest.mark.parametrize(("stage", "change", "message"), CHANGES)
def test_another_later_stage_keeps_the_earlier_ones_files(
    victim: Victim,
    recipe: Callable[..., Recipe],
    finished: Path,
    tmp_path: Path,
    stage: str,
    change: dict[str, Any],
    message: str,
) -> None:
    """Refused until it is agreed to, with what it costs; then the stages before it stay as they are."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "upq.json").unlink()  # as it stands before the end of a run
    kept = {name: times(out / ".work" / name) for name in list(CHAIN)[: list(CHAIN).index(stage)]}
    with pytest.raises(UPQError, match=message + r".*generate, .* kept.*--redo") as caught:
        quantize(victim.model, recipe(**{stage: change}), out)
    assert "\n" not in str(caught.value)
    quantize(victim.model, recipe(**{stage: change}), out, redo=True, keep_work=True)
    assert kept == {name: times(out / ".work" / name) for name in kept}
    assert upq.load(out)


def test_a_refused_change_touches_nothing(victim: Victim, recipe: Callable[..., Recipe], finished: Path) -> None:
    before = times(finished)
    with pytest.raises(UPQError, match=r"distill\.lr was 0\.001 and is now 0\.5"):
        quantize(victim.model, recipe(distill={"lr": 0.5}), finished)
    assert times(finished) == before


def test_an_agreed_change_that_was_stopped_needs_no_second_word(
    victim: Victim, recipe: Callable[..., Recipe], finished: Path, tmp_path: Path
) -> None:
    """And the old artefact stays until the new one is there."""
    out, changed = shutil.copytree(finished, tmp_path / "out"), recipe(distill={"tokens": 1024})
    with pytest.raises(KeyboardInterrupt):
        quantize(victim.model, changed, out, redo=True, progress=EndsBefore("again"))
    assert weights(out) == weights(finished)
    quantize(victim.model, changed, out)
    assert weights(out) != weights(finished)


def test_runs_that_share_a_work_folder_solve_the_blocks_once(
    victim: Victim, recipe: Callable[..., Recipe], finished: Path, tmp_path: Path
) -> None:
    """Four trainings: each its own artefact, as without the folder; nothing is ever thrown away."""
    work, seen = tmp_path / "work", dict[str, int]()
    for lr in (1e-3, 2e-3, 5e-3, 1e-2):
        quantize(victim.model, recipe(distill={"lr": lr}), tmp_path / str(lr), work=work)
        now = times(work)
        assert seen.items() <= now.items()
        seen = now
    assert weights(tmp_path / "0.001") == weights(finished)
    kinds = [path.name.partition("-")[0] for path in work.iterdir()]
    assert [kinds.count(name) for name in CHAIN] == [1, 1, 1, 1, 1, 4, 4, 4]


def test_two_runs_at_once_in_a_shared_folder(victim: Victim, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """The second is refused while the first solves the blocks, by a line that names the first."""

    class Second(Silent):
        def start(self, stage: str, *, done: int = 0) -> None:
            if stage == "int4":
                with pytest.raises(UPQError, match=r"int4-\w+: in use by process \d+"):
                    quantize(victim.model, recipe(), tmp_path / "two", work=tmp_path / "work")
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(victim.model, recipe(), tmp_path / "one", work=tmp_path / "work", progress=Second())


def test_a_finished_run_with_a_shared_folder_says_what_is_kept_there(
    victim: Victim, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    quantize(victim.model, recipe(), tmp_path / "out", work=tmp_path / "work")
    changed, message = (
        recipe(again={"tokens": 512}),
        r"again would be done anew.*, generate, turn, int4, widths, int2, distill, on_policy kept;",
    )
    with pytest.raises(UPQError, match=message):
        quantize(victim.model, changed, tmp_path / "out", work=tmp_path / "work")


def test_weights_do_not_train_after_a_stage_that_leaves_codes_alone(
    victim: Victim, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    wrong = recipe(distill={"train_weights": False})
    with pytest.raises(
        UPQError, match=r"on_policy trains weights, and distill before it leaves codes alone; set on_policy"
    ):
        quantize(victim.model, wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_solved_are_not_transformed(
    victim: Victim, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    stages = {name: CHAIN[name] for name in ("generate", "int4", "turn", "widths", "int2")}
    wrong = Recipe.of({**recipe().model_dump(include={"data"}), "stages": stages}, "here")
    with pytest.raises(UPQError, match="turn changes weights that int4 before it has solved; put it first"):
        quantize(victim.model, wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stage_is_abstract_in_what_it_must_say() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Stage()  # type: ignore[abstract]

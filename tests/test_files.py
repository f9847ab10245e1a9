"""Laws of files: written whole or not at all, equal bytes for equal content, errors that name them."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from safetensors import safe_open
from torch import Tensor

from upq.artifact.card import model_card
from upq.artifact.manifest import MANIFEST, Manifest, SourceModel, read_manifest, write_manifest
from upq.core.errors import UPQError
from upq.files.atomic import written
from upq.files.digests import digest_file, digest_model_dir
from upq.files.metrics import Metrics, read_metrics
from upq.files.tensors import _DTYPES, TensorPlan, load_tensors, save_tensors, write_tensors


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(kind: str, error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    if kind == "file":
        path.write_bytes(b"old")

    def fail() -> None:
        with written(path) as scratch:
            file = scratch if kind == "file" else scratch / "deep" / "file"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"half")
            raise error

    with pytest.raises((UPQError, KeyboardInterrupt)) as caught:
        fail()
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path}: cannot write: no space left on the device; " + (
            "free some space and run the same command again"
        )
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([b"old"] if kind == "file" else [])


def test_what_is_written_has_its_name_and_the_permissions_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"")
    mode = (tmp_path / "new").stat().st_mode
    for path, content in ((tmp_path / "file", b"1"), (tmp_path / "file", b"2")):
        with written(path) as scratch:
            scratch.touch(mode=0o600)
            scratch.write_bytes(content)
        assert (path.read_bytes(), path.stat().st_mode) == (content, mode)
    with written(tmp_path / "directory") as scratch:
        (scratch / "deep").mkdir(parents=True)
        (scratch / "deep" / "file").touch(mode=0o600)
    assert (tmp_path / "directory" / "deep" / "file").stat().st_mode == mode
    with (
        pytest.raises(UPQError, match=r"directory: cannot write: Directory not empty"),
        written(tmp_path / "directory") as scratch,
    ):
        scratch.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file", "new"]


def test_an_empty_directory_stays_the_same_and_gets_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be where a shell stands, or a mount point; `.` has no name."""
    for name in (".", "there", "link"):
        (tmp_path / "there").mkdir()
        (tmp_path / "link").symlink_to("there")
        monkeypatch.chdir(tmp_path / "there" if name == "." else tmp_path)
        before = (tmp_path / "there").stat().st_ino
        with written(Path(name)) as scratch:
            (scratch / "deep").mkdir(parents=True)
            (scratch / "deep" / "file").write_bytes(b"1")
        assert (tmp_path / "there" / "deep" / "file").read_bytes() == b"1"
        assert [path.name for path in (tmp_path / "there").iterdir()] == ["deep"]
        assert (tmp_path / "there").stat().st_ino == before
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").unlink()
        shutil.rmtree(tmp_path / "there")


@pytest.mark.parametrize("path", [".", "..", "/", "", "./", "a/b/..", "\\\\"])
def test_a_model_without_a_name_has_a_stand_in(path: str) -> None:
    model = SourceModel(path=path, digest="x")
    assert model.name == "model"
    assert "# model" in model_card(Manifest(model=model))


@pytest.mark.parametrize("path", ["a", "/x/a", "o/a", "C:\\x\\a", "x/a/", "./a"])
def test_the_name_of_a_model_is_the_last_part_of_its_path(path: str) -> None:
    assert SourceModel(path=path, digest="x").name == "a"


# --- safetensors ---------------------------------------------------------------------------------------------------

TYPES = list(_DTYPES)


@settings(deadline=None, max_examples=100)
@given(
    dtypes=st.lists(st.sampled_from(TYPES), max_size=8),
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=8, max_size=8),
    names=st.lists(st.text(max_size=4), min_size=8, max_size=8, unique=True),
    metadata=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
)
def test_a_file_of_ours_has_the_bytes_of_the_library(
    dtypes: list[torch.dtype], shapes: list[list[int]], names: list[str], metadata: dict[str, str]
) -> None:
    tensors = {
        name: torch.randint(0, 2, shape).to(dtype)
        for name, shape, dtype in zip(names, shapes, dtypes, strict=False)
        if name != "__metadata__"
    }
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "ours", tensors, metadata)
        described = {"upq": json.dumps(metadata, sort_keys=True)}
        assert (Path(folder) / "ours").read_bytes() == safetensors.torch.save(tensors, described)


def test_parts_are_written_one_at_a_time_with_their_digest(tmp_path: Path) -> None:
    """As many parts are alive as one, each tensor is announced once, and the digest is that of the content."""
    alive: list[weakref.ref[Tensor]] = []

    def parts() -> Iterator[Tensor]:
        for row in range(5):
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1
            part = torch.full((1, 3), row, dtype=torch.int32)
            alive.append(weakref.ref(part))
            yield part
            del part

    plans = [TensorPlan(name=name, dtype=torch.int32, shape=(5, 3), parts=parts) for name in ("b", "a")]
    seen: list[str] = []
    path = tmp_path / "x.safetensors"
    write_tensors(path, plans, {"k": "v"}, digest="sha256", wrote=lambda plan: seen.append(plan.name))
    content = torch.arange(5, dtype=torch.int32).repeat_interleave(3).numpy().tobytes() * 2
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"k": "v", "sha256": hashlib.sha256(content).hexdigest()}
    assert path.read_bytes().endswith(content)
    assert seen == ["b", "a"]


def test_tensors_survive_and_bytes_repeat(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {"b": base.T, "a": base[1:].to(torch.bfloat16), "c": torch.arange(3, dtype=torch.uint8)}
    metadata = {"stage": "int4", "block": 3, "z": [1, 2]}
    save_tensors(tmp_path / "1", tensors, metadata)
    save_tensors(tmp_path / "2", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    loaded, found = load_tensors(tmp_path / "1")
    assert found == metadata
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in tensors.items())


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b[:5], lambda b: b"", lambda b: b"\xff" * 40])
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "block.safetensors"
    save_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UPQError, match=r"block\.safetensors: damaged or truncated.*run the same") as caught:
        load_tensors(path)
    assert "\n" not in str(caught.value)


def test_manifest_round_trip_and_errors(tmp_path: Path) -> None:
    manifest = Manifest(
        model=SourceModel(path="org/model", digest="0" * 64),
        recipe={"name": "x", "int2": {"bits": 2}},
        metrics={"source": {"ppl": 4.6}, "artifact": {"ppl": 5.25, "kld": 0.25, "tasks": {"t": {"acc": 0.5}}}},
        data=[{"path": "text.txt", "tokens": 1000}],
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    card = model_card(manifest)
    for part in ("base_model: org/model", "import upq", "| Perplexity | 4.600 | 5.250 |", "bits: 2", "text.txt", "acc"):
        assert part in card
    path = tmp_path / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"manifest_version": 1', '"manifest_version": 99'))
    with pytest.raises(UPQError, match="newer upq"):
        read_manifest(tmp_path)
    path.write_text(text.replace('"seconds"', '"secs"'))
    with pytest.raises(UPQError, match="unknown key 'secs'"):
        read_manifest(tmp_path)
    path.write_text(text[:20])
    with pytest.raises(UPQError, match="cannot be read"):
        read_manifest(tmp_path)
    with pytest.raises(UPQError, match="finished UPQ artefact"):
        read_manifest(tmp_path / "nowhere")


def test_digest_of_a_model_directory(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    before = digest_model_dir(tmp_path)
    (tmp_path / "README.md").write_text("not part of the model")
    assert digest_model_dir(tmp_path) == before
    (tmp_path / "tokenizer.json").write_text("other")
    assert digest_model_dir(tmp_path) != before
    assert digest_file(tmp_path / "README.md") == hashlib.sha256(b"not part of the model").hexdigest()
    with pytest.raises(UPQError, match=r"no config\.json"):
        digest_model_dir(tmp_path / "nowhere")


def test_metrics_of_a_killed_run_have_each_line_once(tmp_path: Path) -> None:
    """Killed at any byte of the file, and gone on from the last checkpoint before: the lines of one that was not."""

    def run(path: Path, first: int) -> None:
        metrics = Metrics(path, "distill")
        metrics.begin("step", first)
        for step in range(first, 6):
            metrics.append("step", step, durable=step % 2 == 1, loss=1 / (step + 1), grad_norm=float("nan"))

    Metrics(tmp_path / "whole", "distill").append("block", 0, error=0.5)
    run(tmp_path / "whole", 0)
    raw, lines = (tmp_path / "whole").read_bytes(), read_metrics(tmp_path / "whole")
    assert [line.get("step") for line in lines] == [None, *range(6)]
    assert lines[1] == {"kind": "step", "stage": "distill", "step": 0, "loss": 1.0, "grad_norm": None}
    for size in range(raw.index(b"\n") + 1, len(raw)):
        (tmp_path / "killed").write_bytes(raw[:size])
        there = read_metrics(tmp_path / "killed")  # half a line is none
        assert there == lines[: len(there)]
        run(tmp_path / "killed", (len(there) - 1) // 2 * 2)
        assert (tmp_path / "killed").read_bytes() == raw


def test_a_broken_line_of_metrics_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step"}\n[1]\n')
    with pytest.raises(UPQError, match=r"metrics\.jsonl:2: no line of metrics"):
        read_metrics(tmp_path / "metrics.jsonl")

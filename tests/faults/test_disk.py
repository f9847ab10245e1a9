"""A full disk, for every writer, or one that cannot be written: one line, nothing half done, and the run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny import tiny_artifact
from upq.artifact.manifest import MANIFEST
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.exports import EXPORTS, export, exporter
from upq.files.tensors import save_tensors
from upq.run.run import quantize
from victim import Unharmed, Victim, outcome

STAGES = ("generate", "data", "int4", "int2", "distill", "check", "export")
Mount = Callable[..., Path]


def fill(disk: Path, *, leave: int = 0) -> Path:
    """A file that takes all the room there is but `leave` bytes."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - leave))
    return filler


class FillsAt(Silent):
    """The disk runs full as `stage` begins."""

    def __init__(self, stage: str, disk: Path) -> None:
        self.stage, self.disk = stage, disk

    def start(self, stage: str, *, done: int = 0) -> None:
        if stage == self.stage:
            fill(self.disk)


def test_the_disk_runs_full_in_each_stage(victim: Victim, unharmed: Unharmed, mount: Mount) -> None:
    """Every stage but the last to write fails once, in one and the same run."""
    disk = mount()
    out = disk / "out"
    for stage in STAGES:
        with pytest.raises(UPQError, match=r"no space left on the device; free some space") as caught:
            quantize(victim.model, victim.recipe(), out, progress=FillsAt(stage, disk))
        assert "\n" not in str(caught.value)
        (disk / "filler").unlink()
        assert (out / MANIFEST).is_file() == (stage == "export")
        assert not (out / ".lock").exists()
        left = [path for path in out.rglob(".*") if path.name != ".work"]
        assert left == []
    quantize(victim.model, victim.recipe(), out)
    assert outcome(out) == unharmed.outcome


def test_a_run_that_resumes_on_a_full_disk_says_so(victim: Victim, mount: Mount) -> None:
    disk = mount()
    fill(disk)
    with pytest.raises(UPQError, match="no space left on the device"):
        quantize(victim.model, victim.recipe(), disk / "out")


def test_half_a_file_is_none(mount: Mount) -> None:
    """The library that writes tensors meets the end of the disk in the middle; what was there before stays."""
    disk = mount(1 << 20)
    path = disk / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(1000)})
    before = path.read_bytes()
    fill(disk, leave=1 << 16)
    with pytest.raises(UPQError, match=rf"{path}: cannot write: no space left"):
        save_tensors(path, {"a": torch.zeros(1 << 17)})
    assert path.read_bytes() == before
    assert sorted(file.name for file in disk.iterdir()) == ["filler", "x.safetensors"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("artifact") / "tiny", hidden_size=64, intermediate_size=64)


@pytest.mark.parametrize("name", EXPORTS.names())
def test_an_export_that_does_not_fit(artifact: Path, mount: Mount, name: str) -> None:
    """The disk ends within what the format's own library writes."""
    try:
        form = exporter(name)
    except UPQError as error:
        pytest.skip(str(error))
    if name == "aqlm":
        pytest.skip("this format holds code books alone, and the artefact has none")
    disk = mount(1 << 20)
    filler = fill(disk, leave=1 << 15)
    out = disk / f"out{form.suffix or ''}"
    with pytest.raises(UPQError, match="no space left on the device; free some space") as caught:
        export(artifact, name, out, options={"allow_inexact": True})
    assert "\n" not in str(caught.value)
    assert list(disk.iterdir()) == [filler]


def test_a_directory_that_cannot_be_written(victim: Victim, unharmed: Unharmed, mount: Mount) -> None:
    disk = mount()
    finished = shutil.copytree(unharmed.out, disk / "finished")
    (disk / "empty").mkdir()
    mount(at=disk, readonly=True)
    for out in (disk / "new", disk / "empty"):
        with pytest.raises(UPQError, match=r"cannot write: Read-only file system; check the path") as caught:
            quantize(victim.model, victim.recipe(), out)
        assert "\n" not in str(caught.value)
    # What is finished needs nothing written.
    assert quantize(victim.model, victim.recipe("export=[]"), finished).layers

"""`upq.json`: the origin and the content of an artefact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from upq.core.bounded import read_json
from upq.core.config import Strict, decode
from upq.core.errors import UPQError
from upq.files.atomic import atomic_write
from upq.files.digests import TEMPLATES, digest_file
from upq.files.tensors import plain_name

MANIFEST = "upq.json"
MANIFEST_VERSION = 1


class SourceModel(Strict):
    path: str
    digest: str  # of the files, see digest_model_dir

    @property
    def name(self) -> str:
        """The last part of the path; of one that has none (`.`) a stand-in."""
        last = self.path.replace("\\", "/").rstrip("/").rpartition("/")[2]
        return "model" if last in ("", ".", "..") else last


class Layer(Strict):
    name: str
    bits: int
    group_size: int
    grid: str
    weights: int  # number of weights
    bits_per_weight: float  # stored, scales included
    error: float | None = None  # of the weights as the INT2 stage left them: ‖Ŵ - W‖ / ‖W‖
    unreached: list[int] = Field(default_factory=list)  # experts that no calibration token reached


class FileEntry(Strict):
    bytes: int
    sha256: str


class Manifest(Strict):
    """Written last, so its presence means complete."""

    manifest_version: int = MANIFEST_VERSION
    recipe: dict[str, Any] = Field(default_factory=dict)
    model: SourceModel
    versions: dict[str, str] = Field(default_factory=dict)
    data: list[dict[str, Any]] = Field(default_factory=list)
    coverage: str = ""  # how much became codes, and why the rest did not
    layers: list[Layer] = Field(default_factory=list)
    transforms: list[str] = Field(default_factory=list)  # what was folded into the weights before they became codes
    # By block whose output has massive states (attention sinks): see upq.blockwise._sinks, and `error`, that of the
    # states as the last block-wise stage left them: ‖difference‖ / ‖target‖.
    massive: dict[int, dict[str, Any]] = Field(default_factory=dict)
    # By model: "source" and "artifact"; keys as in `upq eval --json`: ppl, kld, top1, bits_per_weight, bytes, compute,
    # dtype, tasks.
    metrics: dict[str, dict[str, Any]] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)  # by stage
    peak_memory_bytes: int | None = None
    skipped_steps: list[int] = Field(default_factory=list)  # of the training: their loss or gradient was not finite
    # By stage that trained on the student's own answers: `written`, their mean length in `tokens`, the shares that were
    # cut `at_limit` and that end in `loops`, and both of the last round.
    answers: dict[str, dict[str, float]] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)

    @property
    def weights(self) -> int:
        """How many became codes."""
        return sum(layer.weights for layer in self.layers)

    def figures(self) -> dict[str, dict[str, Any]]:
        """`metrics`, with the artefact's size also where no check has measured it."""
        models = {name: dict(figures) for name, figures in self.metrics.items()}
        here = models.setdefault("artifact", {})
        here.setdefault("bytes", sum(f.bytes for name, f in self.files.items() if name.endswith(".safetensors")))
        if self.weights:
            bits = sum(layer.bits_per_weight * layer.weights for layer in self.layers)
            here.setdefault("bits_per_weight", bits / self.weights)
        return models


def read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not path.exists():
        raise UPQError(f"{directory}: no {MANIFEST} here; is it a finished UPQ artefact?")
    raw = read_json(path, remedy="delete it and run the same command again")
    if isinstance(raw, dict) and isinstance(found := raw.get("manifest_version"), int) and found > MANIFEST_VERSION:
        raise UPQError(f"{path}: written by a newer upq (manifest {found}); upgrade: pip install -U upq")
    manifest = decode(Manifest, raw, str(path))
    for name in manifest.files:
        folder, _, file = name.rpartition("/")
        plain_name(name if folder != TEMPLATES else file, str(path))
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    atomic_write(directory / MANIFEST, text + "\n")


def verify(directory: Path, manifest: Manifest) -> None:
    """Raise UPQError for the first file of an artefact that differs from its manifest.

    Reads every file, at the speed of SHA-256 or of the disk.
    """
    remedy = "copy or download the artefact again"
    for name, entry in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise UPQError(f"{file}: missing, though {MANIFEST} lists it with sha256 {entry.sha256}; {remedy}")
        if (size := file.stat().st_size) != entry.bytes:
            raise UPQError(f"{file}: damaged: of {size} bytes, {MANIFEST} says {entry.bytes}; {remedy}")
        if (found := digest_file(file)) != entry.sha256:
            raise UPQError(f"{file}: damaged: its sha256 is {found}, {MANIFEST} says {entry.sha256}; {remedy}")


def file_entry(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=digest_file(path))

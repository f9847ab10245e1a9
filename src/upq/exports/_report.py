"""What an export turned out to be: stored beside it, shown at the end of the command."""

from __future__ import annotations

import json
from pathlib import Path

from upq.core.bounded import read_json
from upq.core.config import Strict, decode
from upq.files.atomic import atomic_write

REPORT = "export.json"


class Carried(Strict):
    """The weights that one of the engine's types carries."""

    carrier: str
    weights: int  # matrices and vectors
    numbers: int  # in them
    bytes: int
    max_error: float  # largest |read back - artefact|
    relative_error: float  # ‖read back - artefact‖ / ‖artefact‖ over all of them


class Report(Strict):
    format: str
    options: dict[str, str | int | float | bool | None]
    artifact: str  # path of the artefact
    artifact_digest: str  # of its upq.json
    exact: bool  # every weight, bit for bit
    bytes: int  # of all files
    bits_per_weight: float  # of the decoder's linears, scales included
    carriers: list[Carried]
    losses: dict[str, str]  # what is not exact, by name of the weight, and why
    notes: list[str]
    engine: dict[str, str]  # package: version
    checked: str  # how the export was read back
    compared_in: str  # float32, or the type of the model: as the packed model computes
    seconds: dict[str, float]  # write, check


def report_path(out: Path) -> Path:
    """Within a directory, beside a file: `model.gguf` has `model.export.json`."""
    return out / REPORT if out.is_dir() else out.with_suffix(f".{REPORT}")


def write_report(path: Path, report: Report) -> None:
    atomic_write(path, json.dumps(report.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")


def read_report(path: Path) -> Report:
    return decode(Report, read_json(path, remedy="export again"), str(path))

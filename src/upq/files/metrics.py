"""Figures of a run as it goes: JSON lines, appended. What a resumed run does again has its lines once.

A line has its `kind` and, where a kind comes many times, its number under that name: `{"kind": "step", "step": 7, …}`.
Law (tests/test_files.py): a run that was killed at any byte and goes on ends with the lines of one that was not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upq.core.bounded import read_bytes
from upq.core.errors import UPQError
from upq.files.atomic import atomic_write, write_errors

METRICS = "metrics.jsonl"
_BYTES = 1 << 30  # a step has 200: a training of five million

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Appends the figures of one stage to `path`. Without a path nothing is kept: in all processes but the first.

    `follow` gets each line once, in their order: those that are kept as the stage goes on, and each that is appended.
    """

    path: Path | None = None
    stage: str = ""
    follow: Callable[[Line], None] | None = None

    def begin(self, kind: str, number: int) -> None:
        """Lines of `kind` will come from `number` on: those that are there already go, and half a line at the end."""
        if self.path is None or not self.path.is_file():
            return
        whole = read_metrics(self.path)
        kept = [line for line in whole if line.get("kind") != kind or line.get(kind, 0) < number]
        if len(kept) < len(whole) or not self.path.read_bytes().endswith(b"\n"):
            write_metrics(self.path, kept)
        if self.follow is not None:
            for line in kept:
                self.follow(line)

    def append(self, kind: str, number: int, *, durable: bool = False, **figures: Any) -> None:
        """`durable`: on the disk on return, before what the line is of is. Figures that are not finite become null."""
        if self.path is None:
            return
        line = _finite({"kind": kind, "stage": self.stage, kind: number, **figures})
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_text(line))
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        if self.follow is not None:
            self.follow(line)


NOWHERE = Metrics()


def write_metrics(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """A file with these lines, whole or as it was before."""
    atomic_write(path, "".join(map(_text, lines)))


def read_metrics(path: Path) -> list[Line]:
    """The whole lines of a file that may be growing; none where there is no file.

    Raises UPQError for a line that is no JSON object.
    """
    if not path.is_file():
        return []
    raw = read_bytes(path, _BYTES, remedy="is it a run's?")
    found = []
    for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise UPQError(f"{path}:{number}: no line of metrics; remove the file, the run does not need it")
        found.append(entry)
    return found


def _finite(line: Mapping[str, Any]) -> Line:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(_finite(line), ensure_ascii=False, allow_nan=False) + "\n"

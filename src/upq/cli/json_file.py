"""`--json FILE`: the figures of a command as a file."""

from __future__ import annotations

import json
from pathlib import Path

from upq.core.errors import UPQError


def check(path: Path | None) -> None:
    """Call before the work: a command of hours must not end in a missing directory."""
    if path is not None and not path.absolute().parent.is_dir():
        raise UPQError(f"--json {path}: no such directory {path.absolute().parent}; create it first")


def write(path: Path | None, figures: object) -> None:
    from upq.files.atomic import atomic_write

    if path is not None:
        atomic_write(path, json.dumps(figures, indent=2) + "\n")

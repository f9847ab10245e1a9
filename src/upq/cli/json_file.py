"""`--json FILE`: the figures of a command as a file."""

from __future__ import annotations

import json
from pathlib import Path

from upq.core.errors import UPQError
from upq.core.paths import local


def check(path: Path | None) -> None:
    """Call before the work: a command of hours must not end in a missing directory."""
    if path is None:
        return
    if (folder := _target(path).parent) and not folder.is_dir():
        raise UPQError(f"--json {path}: no such directory {folder}; create it first")
    if local(path).is_dir():
        raise UPQError(f"--json {path}: is a directory; name a file in it")


def write(path: Path | None, figures: object) -> None:
    from upq.files.atomic import atomic_write, write_errors

    if path is None:
        return
    text = json.dumps(figures, indent=2) + "\n"
    if _is_file(path):
        atomic_write(_target(path), text)
    else:
        with write_errors(path), local(path).open("a") as opened:  # a file behind /dev/stdout keeps what is in it
            opened.write(text)


def _target(path: Path) -> Path:
    """The file itself where `path` is a link to it: the link stays."""
    return local(path).resolve()


def _is_file(path: Path) -> bool:
    """Whether a file can take the place of what is there. Of a pipe or a device none can: it is written to."""
    path = local(path).absolute()
    if str(path).startswith(("/dev/std", "/dev/fd/", "/proc/")):
        return False
    return not path.exists() or path.is_file()

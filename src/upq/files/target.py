"""`--json FILE`: the figures of a command as a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

from upq.core.errors import UPQError
from upq.core.paths import local


@dataclass(frozen=True)
class Target:
    """Where figures go. What is no regular file, a pipe or a device, is written to and stays what it is."""

    path: Path | None
    stream: TextIO | None = None

    @classmethod
    def of(cls, path: Path | None, option: str = "--json") -> Self:
        """Call before the work: a command of hours must not end in a missing directory, or a pipe without a reader."""
        if path is None:
            return cls(None)
        if local(path).is_dir():
            raise UPQError(f"{option} {path}: is a directory; name a file in it")
        if not _is_file(path):
            try:
                return cls(path, local(path).open("a"))  # a file behind /dev/stdout keeps what is in it
            except OSError as error:
                raise UPQError(f"{option} {path}: cannot be written to ({error.strerror}); name a file") from None
        target = local(path).resolve()  # of a link, which stays
        if not target.parent.is_dir():
            raise UPQError(f"{option} {path}: no such directory {target.parent}; create it first")
        return cls(target)

    def write(self, figures: object) -> None:
        """As JSON."""
        self.write_text(json.dumps(figures, indent=2) + "\n")

    def write_text(self, text: str) -> None:
        from upq.files.atomic import atomic_write, write_errors

        if self.path is None:
            return
        if self.stream is None:
            atomic_write(self.path, text)
        else:
            with write_errors(self.path), self.stream as stream:
                stream.write(text)


def _is_file(path: Path) -> bool:
    """Whether a file can take the place of what is there."""
    path = local(path).absolute()
    if str(path).startswith(("/dev/std", "/dev/fd/", "/proc/")):
        return False
    return not path.exists() or path.is_file()

"""Git LFS pointers: what a clone has in place of large files until they are fetched."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from upq.core.errors import UPQError

_BEGINNING = b"version https://git-lfs.github.com/spec/"
_BYTES = 1024  # a pointer is smaller (github.com/git-lfs/git-lfs/blob/main/docs/spec.md)


def check_pointer(path: Path) -> None:
    """UPQError where a file is a pointer. A file that cannot be opened passes: its reader says why."""
    with suppress(OSError):
        if path.stat().st_size >= _BYTES:
            return
        with path.open("rb") as file:
            beginning = file.read(len(_BEGINNING))
        if beginning == _BEGINNING:
            where = path.absolute().parent
            raise UPQError(f"{path}: a Git LFS pointer, the file itself is not here; run `git lfs pull` in {where}")

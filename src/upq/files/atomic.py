"""Files written whole or not at all, and one line for a write that the system refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from upq.core.errors import UPQError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROOM = 1 << 16  # bytes; a disk with less is full: a write that fails has filled it up to the last block


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A scratch path beside `path`, for a file or a directory. It gets the name `path` once its content is on the disk.

    On any failure the scratch path goes and `path` is as it was. A file is replaced; a directory must be new or empty.
    An empty one stays and gets the files one by one: it may be where a shell stands, or a mount.
    """
    target = Path(os.path.abspath(path))  # `.` has no name
    there = target.is_dir()
    scratch = (target if there else target.parent) / f".{target.name}.{os.getpid()}.tmp"
    try:
        with write_errors(path):
            yield scratch
            umask = os.umask(0)
            os.umask(umask)
            for file in [scratch] if scratch.is_file() else filter(Path.is_file, scratch.rglob("*")):
                file.chmod(0o666 & ~umask)  # safetensors creates files that only their owner can read
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            if there and scratch.is_dir():
                _move_into(target, scratch)
            else:
                scratch.replace(target)
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def _move_into(target: Path, scratch: Path) -> None:
    if any(path != scratch for path in target.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    for path in scratch.iterdir():
        path.replace(target / path.name)


def atomic_write(path: Path, content: bytes | str) -> None:
    """A file with this content, whole or as it was before."""
    with written(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into one line with a remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = _is_full(error, path)
        remedy = "free some space and run the same command again" if full else "check the path and its permissions"
        reason = "no space left on the device" if full else getattr(error, "strerror", None) or str(error)
        raise UPQError(f"{path}: cannot write: {reason}; {remedy}") from error


def _is_full(error: OSError | SafetensorError, path: Path) -> bool:
    """Whether a write failed for want of space; libraries say so in words of their own, or not at all."""
    if (code := getattr(error, "errno", None)) is not None:
        return code in _FULL
    if any(f"os error {code}" in str(error) for code in _FULL):  # safetensors
        return True
    return path.parent.is_dir() and shutil.disk_usage(path.parent).free < _ROOM

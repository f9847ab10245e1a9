"""Files written whole or not at all, and one line for a write that the system refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from upq.core.errors import UPQError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROOM = 1 << 16  # bytes; a disk with less is full: a write that fails has filled it up to the last block


def atomic_write(path: Path, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write `path` whole: into a neighbour first, then renamed. On any failure `path` is as it was before."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with write_errors(path):
            with tmp.open("wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A scratch directory whose files move into `out` on success, each whole; on failure `out` is as it was before."""
    with write_errors(out):
        scratch = Path(tempfile.mkdtemp(prefix=".upq-", dir=out))
    try:
        with write_errors(out):
            yield scratch
            umask = os.umask(0)
            os.umask(umask)
            for file in sorted(scratch.iterdir()):
                file.chmod(0o666 & ~umask)  # safetensors creates files that only their owner can read
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            for file in sorted(scratch.iterdir()):
                file.replace(out / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A scratch path beside `out`, for a file or a directory, that gets its name on success; on failure it goes."""
    scratch = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with write_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            yield scratch
            for file in scratch.rglob("*") if scratch.is_dir() else [scratch]:
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            scratch.replace(out)
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        elif scratch.exists():
            scratch.unlink()


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
    """Whether a write failed for want of space; libraries tell it in words of their own, or not at all."""
    if (code := getattr(error, "errno", None)) is not None:
        return code in _FULL
    if any(f"os error {code}" in str(error) for code in _FULL):  # safetensors
        return True
    return path.parent.is_dir() and shutil.disk_usage(path.parent).free < _ROOM

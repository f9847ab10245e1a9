"""Directory lock: a file that the kernel locks (flock). The file also names its owner, for the error message.

The lock is flock(2)'s: it ends with its process, however that ends. The record decides only what the kernel does not
know: on a shared file system, whether the owner is another machine whose locks do not come through, or which died.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from upq.core.config import Strict
from upq.core.errors import UPQError
from upq.files.atomic import write_errors

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


class Owner(Strict):
    """Who holds a lock. `since` is for the reader: nothing is computed from it, clocks jump."""

    pid: int
    host: str
    boot: str | None  # of the kernel: containers on one machine share it, and with it their locks
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def same_machine(self, other: Owner) -> bool:
        return self.host == other.host or (self.boot is not None and self.boot == other.boot)


@contextmanager
def lock(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold `path`, which goes at the end. UPQError, with owner and remedy, where another process does.

    The lock of a process of this machine that has died is taken over, with a `note`. One that was left by another
    machine is refused: whether its run goes on cannot be known from here.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file, locked = _open(path)
    try:
        me, owner = _this(), _recorded(file)
        held = f"{path.parent}: in use by {owner or 'another process'}"
        if locked is False:
            raise UPQError(f"{held}; wait for it or stop it, or use another --out")
        if owner is not None and not owner.same_machine(me):
            raise UPQError(f"{held}, by its lock; if that run is over, delete {path} and run the same command again")
        if locked is None and owner is not None and _runs(owner.pid):
            raise UPQError(f"{held}, by its lock; wait for it, or delete {path} if that is no run of upq")
        if locked is None:
            note(f"{path.parent}: this file system has no locks; start no second run there")
        if owner is not None:
            note(f"{path.parent}: taken over from {owner}, which did not end in order")
        with write_errors(path):
            os.ftruncate(file, 0)
            os.pwrite(file, me.model_dump_json().encode(), 0)
        try:
            yield
        finally:
            # Before the lock goes: a process that has opened the file by then sees that it has no name any more.
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _open(path: Path) -> tuple[int, bool | None]:
    """The file, and whether it is locked now; None where the file system has no locks."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return file, False
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return file, None
            os.close(file)
            raise
        if os.fstat(file).st_nlink:
            return file, True
        os.close(file)  # its owner has removed it in between: this lock would guard no name


def _recorded(file: int) -> Owner | None:
    """None where there is no record, or half of one: its owner died, or is about, to write it."""
    try:
        return Owner.model_validate(json.loads(os.pread(file, 4096, 0)))
    except (ValueError, ValidationError):
        return None


def _this() -> Owner:
    boot = _BOOT.read_text().strip() if _BOOT.is_file() else None
    since = datetime.now(UTC).isoformat(" ", "seconds")
    return Owner(pid=os.getpid(), host=platform.node(), boot=boot, since=since)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Directory lock: one process at a time. The locked file also names its owner, for the error message.

filelock uses flock(2), so a lock ends with its process, however that ends. The record decides only where the kernel
cannot: on a shared file system the owner may be another machine, whose locks do not come through, or which died.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
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
    file = FileLock(path, timeout=0.1, poll_interval=0.02, fallback_to_soft=False)  # its owner may just be done
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        locked = _acquired(file)
    try:
        me, owner = _this(), _recorded(path)
        held = f"{path.parent}: in use by {owner or 'another process'}"
        if locked is False:
            raise UPQError(f"{held}; wait for it or stop it, or use another --out")
        if owner is not None and not owner.same_machine(me):
            raise UPQError(f"{held}, by its lock; if that run is over, delete {path} and run the same command again")
        if locked is None and owner is not None and psutil.pid_exists(owner.pid):
            raise UPQError(f"{held}, by its lock; wait for it, or delete {path} if that is no run of upq")
        if locked is None:
            note(f"{path.parent}: this file system has no locks; start no second run there")
        if owner is not None:
            note(f"{path.parent}: taken over from {owner}, which did not end in order")
        with write_errors(path):
            path.write_text(me.model_dump_json())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock goes: filelock takes no lock on a file without a name
    finally:
        file.release()


def _acquired(file: FileLock) -> bool | None:
    """Whether the lock is held now; None where the file system has no locks."""
    try:
        file.acquire()
    except Timeout:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _recorded(path: Path) -> Owner | None:
    """None where there is no record, or half of one: its owner died, or is about, to write it."""
    try:
        return Owner.model_validate_json(path.read_bytes()[:4096])
    except (OSError, ValidationError):
        return None


def _this() -> Owner:
    boot = _BOOT.read_text().strip() if _BOOT.is_file() else None
    since = datetime.now(UTC).isoformat(" ", "seconds")
    return Owner(pid=os.getpid(), host=platform.node(), boot=boot, since=since)

"""The child process of `upq.evals.sandbox`: limits, then one program. Run by its path, with the standard library alone.

It reads its orders as JSON on stdin and writes two words to stdout: whether the kernel keeps it apart, and the outcome.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG = 1
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PROCESSES = ("os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.system", "pty.", "subprocess.")
_CHANGES = (
    "os.chflags", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
    "os.truncate", "os.utime",
)  # fmt: skip


def main() -> None:
    orders = json.load(sys.stdin)
    said, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    apart = _apart()
    os.write(said, b"apart " if apart else b"beside ")
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if os.WIFSIGNALED(status) and used.ru_utime + used.ru_stime > orders["seconds"] - 0.1:
            os.write(said, b"time")  # the kernel's limit has come before the parent's
        os._exit(0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _limit(orders["seconds"], orders["memory"], orders["file"], apart=apart)
    os.write(said, _outcome(orders["program"], os.path.realpath(orders["folder"]), said))
    os._exit(0)


def _apart() -> bool:
    """New namespaces of users, processes and networks, where the kernel gives them: this one has no network at all."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC) == 0)


def _limit(seconds: int, memory: int, file: int, *, apart: bool) -> None:
    kinds = [(resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, file)]
    kinds += [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64)]
    if apart:  # elsewhere all processes of the user count
        kinds.append((resource.RLIMIT_NPROC, 64))
    for kind, most in kinds:
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with suppress(OSError, ValueError):  # macOS has no limit of memory
            resource.setrlimit(kind, (most, most))


def _outcome(program: str, folder: str, said: int) -> bytes:
    sys.addaudithook(_guard(folder, said))
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except MemoryError:
        return b"memory"
    except BaseException:  # a program that ends itself has not come to its tests
        return b"failed"
    return b"passed"


def _guard(folder: str, said: int) -> Any:
    """An audit hook that ends the process at what a program has no business with. A program cannot catch it."""

    def end(outcome: bytes) -> None:
        os.write(said, outcome)
        os._exit(1)

    def inside(path: Any, at: Any) -> bool:
        if isinstance(path, int):
            return True  # a file that is open already
        name = os.fsdecode(path)
        if isinstance(at, int) and at >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{at}"), name)
        real = os.path.realpath(name)
        return real == os.devnull or real.startswith(folder + os.sep) or real == folder

    def guard(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith("socket."):
            end(b"network")
        elif event.startswith(_PROCESSES) or event == "ctypes.dlopen":
            end(b"process")
        elif event == "open":
            path, mode, flags = args
            writes = flags & _WRITES if mode is None else bool(set(str(mode)) & set("wax+"))
            if writes and not inside(path, None):
                end(b"files")
        elif event in _CHANGES:
            paths = [each for each in args if isinstance(each, str | bytes | os.PathLike)]
            at = args[-1] if len(paths) == 1 else None
            if not all(inside(path, at) for path in paths):
                end(b"files")

    return guard


if __name__ == "__main__":
    main()

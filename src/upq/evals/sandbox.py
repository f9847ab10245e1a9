"""Runs a program that a model has written: a child process with limits, without network and without files of others.

Against what a model writes by accident, not against an attacker: it shares the machine's kernel. Where Linux gives
namespaces to everybody, the child has none of the machine's network and processes. Everywhere a hook in its interpreter
ends it at the first socket, process or change outside of its own folder, and its time and its memory are limited.

Law (tests/test_sandbox.py): whatever the program does, `run` returns, no process is left, and no file but its own is
written.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from upq.core.errors import UPQError

# What ended a program that has not passed its tests. `failed`: an exception, or an end of its own.
Ending = Literal["passed", "failed", "time", "memory", "process", "network", "files", "died"]


@dataclass(frozen=True, slots=True)
class Limits:
    seconds: int = 10  # of its clock, and of its processor time
    memory: int = 1 << 30  # bytes of address space
    file: int = 16 << 20  # bytes of a file


@dataclass(frozen=True, slots=True)
class Ran:
    ending: Ending
    apart: bool  # in namespaces of its own

    @property
    def passed(self) -> bool:
        return self.ending == "passed"


def check() -> Ran:
    """An empty program, to see that programs can be run here. Raises UPQError."""
    if os.name != "posix":
        raise UPQError("programs of a model are run on Linux and macOS alone: no other system limits their memory")
    if not (found := run("")).passed:
        raise UPQError(f"an empty program does not run here ({found.ending}); are Python and /tmp what they should be?")
    return found


def run(program: str, limits: Limits = Limits()) -> Ran:
    """Run a program to its end, or to a limit. It has passed where no line of it raised."""
    with tempfile.TemporaryDirectory(prefix="upq-program-", ignore_cleanup_errors=True) as folder:
        orders = {"program": program, "folder": folder, "seconds": limits.seconds, "memory": limits.memory}
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"TMPDIR": folder, "HOME": folder, "LC_ALL": "C.UTF-8"},
            start_new_session=True,  # its processes are one group, to be killed together
        )
        out, late = b"", False
        try:
            # A loaded machine may take long to start an interpreter; processor time is limited apart.
            out, _ = child.communicate(json.dumps({**orders, "file": limits.file}).encode(), limits.seconds + 2)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            out = child.communicate()[0] or out
    where, _, ending = out.decode(errors="replace").partition(" ")
    if late or ending not in get_args(Ending):
        ending = "time" if late else "died"
    return Ran(cast(Ending, ending), where == "apart")

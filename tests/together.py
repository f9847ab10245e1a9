"""Fresh processes for tests, one or several at one function, as forks of a server that has the imports."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from upq.core.processes import Processes

# A fresh Python spends 13 s of processor on importing torch, transformers and upq (AVX2, one core); a fork, 0.1 s.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["imported"])
_TIMEOUT = 120  # seconds that a process waits for another in the group


@dataclass(frozen=True)
class Ended:
    """A process that is over."""

    returncode: int  # minus the signal, where one killed it
    output: str  # stdout and stderr


def alone(work: Callable[..., Any], *arguments: Any, seconds: float = 300) -> Ended:
    """Call `work`, a function of a module, in a process of its own, which may be killed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = SERVER.Process(target=_redirected, args=(str(log), work, arguments))
        process.start()
        process.join(seconds)
        code = process.exitcode
        if code is None:
            process.kill()
        output = log.read_text(errors="replace") if log.exists() else ""
        assert code is not None, f"still running after {seconds} s: {output}"
        return Ended(code, output)


def together(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `work`, a function of a module, in `world` gloo processes, with Processes first: what each returns.

    The environment is torchrun's, so that accelerate joins the same group.
    """
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, mp_context=SERVER) as pool:
        begun = [pool.submit(_member, rank, world, f"file://{folder}/met", work, arguments) for rank in range(world)]
        return [each.result() for each in begun]


def redirect(log: str) -> None:
    """Send stdout and stderr to the file `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _redirected(log: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    redirect(log)
    torch.set_num_threads(1)
    work(*arguments)


def _member(rank: int, world: int, place: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()}, ACCELERATE_USE_CPU="true")
    torch.distributed.init_process_group(
        "gloo", init_method=place, rank=rank, world_size=world, timeout=timedelta(seconds=_TIMEOUT)
    )
    try:
        found = work(Processes(rank, world), *arguments)
        torch.distributed.barrier()
    finally:
        with contextlib.suppress(ValueError):  # where `work` has ended the group itself
            torch.distributed.destroy_process_group()
    return found

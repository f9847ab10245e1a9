"""Some gloo processes at one function, as forks of a server that has the imports: a group is there in a second."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch

from upq.core.processes import Processes

# Importing torch and transformers costs seconds a process.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["upq.cli", "upq.run.run"])
_TIMEOUT = 120  # seconds: a process that waits for one that has left fails then


def together(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work`, a function of a module, returns in each of `world` processes: its first argument is Processes."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, mp_context=SERVER) as pool:
        begun = [pool.submit(_process, rank, world, f"file://{folder}/met", work, arguments) for rank in range(world)]
        return [each.result() for each in begun]


def _process(rank: int, world: int, place: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=place, rank=rank, world_size=world, timeout=timedelta(seconds=_TIMEOUT)
    )
    try:
        found = work(Processes(rank, world), *arguments)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    return found

"""What two gloo processes do for several test modules: one group for all of them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from together import together
from upq.core.processes import Processes

# `prepare(folder)` before them in one process, then `ranked(folder)` in both.
MODULES = ("test_blockwise_processes", "test_distill_sharding")


def launch(folder: Path) -> None:
    for name in MODULES:
        (folder / name).mkdir()
        import_module(name).prepare(folder / name)
    together(2, _both, folder)


def _both(_: Processes, folder: Path) -> None:
    for name in MODULES:
        import_module(name).ranked(folder / name)

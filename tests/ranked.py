"""What two gloo processes do for several test modules: one start of torchrun, which is seconds of imports, for all."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch

# `prepare(folder)` before them in one process, then `ranked(folder)` in both.
MODULES = ("test_blockwise_processes", "test_distill_sharding")


def launch(folder: Path) -> None:
    for name in MODULES:
        (folder / name).mkdir()
        import_module(name).prepare(folder / name)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, __file__, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for name in MODULES:
        import_module(name).ranked(Path(sys.argv[1]) / name)
    torch.distributed.destroy_process_group()

"""A measurement in a process of its own, whose time and memory are its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_alone(script: str | Path, *arguments: object, python: Path | None = None, threads: int = 0) -> dict[str, Any]:
    """Run a script; the last line it prints is its answer. `threads`: of torch, where it is not 0."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [str(python or sys.executable), str(script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer

"""Rows of a benchmark: each is a packaged recipe with overrides, and runs in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upq.run.recipe import Recipe

NO_TRAINING = "distill.tokens=0"
FROM_FP = "int4=null"
# Adds an INT4 stage before `int2`, as in `paper`, with the relative error that `default` has in its own.
THROUGH_INT4 = "through INT4"
_INT4 = {
    "stage": "blockwise",
    "bits": 4,
    "samples": 128,
    "method": {"name": "flexround", "scale": "mse", "relative": True, "iterations": 400, "batch_size": 2, "lr": 3e-3},
}
_METHOD = re.compile(r"\{(\w+)\.(int[24])\}")


def load_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """A packaged recipe; `{default.int2}` in an override stands for the method of that recipe's stage."""
    from upq.run.recipe import Recipe

    def method(match: re.Match[str]) -> str:
        return json.dumps(Recipe.load(match[1]).model_dump(mode="json")["stages"][match[2]]["method"])

    raw = Recipe.load(name).model_dump(mode="json")
    if THROUGH_INT4 in overrides:
        early = {stage: settings for stage, settings in raw["stages"].items() if stage == "generate"}
        raw["stages"] = {**early, "int4": _INT4, **raw["stages"]}
    settings = [_METHOD.sub(method, override) for override in overrides if override != THROUGH_INT4]
    return Recipe.of(raw, name).changed(settings)


def run_again(arguments: Sequence[str], *, log: Path, jobs: int) -> bool:
    """Run this benchmark's own file once more with `arguments`, what it says in `log`; True if it failed.

    A process of its own has a peak memory of its own. The cores are shared out among `jobs` such processes, unless
    OMP_NUM_THREADS says how many threads each has.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, sys.argv[0], *arguments],
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            stdout=file,
            stderr=file,
            check=False,
        )
    return done.returncode != 0

"""A clock that jumps changes nothing: durations are monotonic, and nobody asks when a file was written."""

from __future__ import annotations

import ast
import random
import time
from pathlib import Path

import pytest

import upq
from upq.artifact.manifest import read_manifest
from upq.run.run import quantize
from victim import Unharmed, Victim, outcome

WALL = {"time", "time_ns", "now", "utcnow", "today", "st_mtime", "st_mtime_ns", "st_ctime", "ctime", "localtime"}
FOR_READERS = {"lock.py", "transformers_server.py"}  # name a time in a message, and in a list of models


def test_a_clock_that_jumps(
    victim: Victim, unharmed: Unharmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, began = random.Random(0), time.monotonic()
    monkeypatch.setattr(time, "time", lambda: chance.uniform(0, 4e9))
    monkeypatch.setattr(time, "time_ns", lambda: chance.randrange(4 * 10**18))
    quantize(victim.model, victim.recipe(), tmp_path / "out")
    assert outcome(tmp_path / "out") == unharmed.outcome
    seconds = read_manifest(tmp_path / "out").seconds
    assert min(seconds.values()) > 0
    assert sum(seconds.values()) < time.monotonic() - began


def test_nothing_reads_the_clock_on_the_wall() -> None:
    folder = Path(upq.__file__).parent
    readers = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in WALL:
                readers.add(path.name)
    assert readers == FOR_READERS

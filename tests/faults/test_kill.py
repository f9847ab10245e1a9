"""kill -9, wherever: the same command then ends in the bytes of a run that nothing happened to."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from victim import Command, Unharmed, Victim, outcome


def test_killed_in_every_stage_one_after_the_other(victim: Victim, unharmed: Unharmed, tmp_path: Path) -> None:
    """A little after the first block of INT4, the second of INT2 and the first checkpoint, all in one directory."""
    out, chance = tmp_path / "out", random.Random(0)
    for sign in ("int4/block-0000.safetensors", "int2/block-0001.safetensors", "distill/checkpoint.safetensors"):
        command = Command(victim.arguments(out), tmp_path / "log")
        command.wait_for((out / ".work" / sign).is_file)
        time.sleep(chance.uniform(0, 0.03))
        command.signal(signal.SIGKILL)
        assert command.end() == -signal.SIGKILL
        assert not (out / "upq.json").exists()
        assert not (out / "model.safetensors").exists()
        for path in out.rglob("*"):  # by the clock, it was all written in 1970
            os.utime(path, (0, 0))
    command = Command(victim.arguments(out), tmp_path / "log")
    assert command.end() == 0, command.said()
    assert "taken over from process" in command.said()
    assert "resumed the training at step" in command.said()
    assert outcome(out) == unharmed.outcome  # and nothing else in the directory


@pytest.mark.soak
@pytest.mark.parametrize("part", range(25))
def test_killed_at_a_random_moment(victim: Victim, unharmed: Unharmed, tmp_path: Path, part: int) -> None:
    """One moment in each of 25 equal parts of the run."""
    out = tmp_path / "out"
    moment = 1 + int(unharmed.operations * (part + random.Random(part).random()) / 25)
    command = Command(victim.arguments(out), tmp_path / "log", dies_at=moment)
    assert command.end() == -signal.SIGKILL
    print(f"killed at {moment} of {unharmed.operations}, with", *sorted(path.name for path in out.rglob("*")))
    command = Command(victim.arguments(out), tmp_path / "log")
    assert command.end() == 0, command.said()
    assert outcome(out) == unharmed.outcome


@pytest.mark.soak
def test_killed_again_and_again(victim: Victim, unharmed: Unharmed, tmp_path: Path) -> None:
    """Every life is a little longer than the one before, until one is long enough."""
    out, lives = tmp_path / "out", 1
    while Command(victim.arguments(out), tmp_path / "log", dies_at=10 * lives).end() != 0:
        lives += 1
    assert lives > 5
    assert outcome(out) == unharmed.outcome

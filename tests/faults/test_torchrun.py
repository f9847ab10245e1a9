"""torchrun: the same directory goes from one process to two and back, and a signal to the launcher saves the step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from upq.artifact import load_metadata
from victim import BLOCKS, RECIPE, Command, Unharmed, Victim


def test_from_one_process_to_two_and_back(victim: Victim, unharmed: Unharmed, tmp_path: Path) -> None:
    """Stopped by Ctrl-C in its INT4 stage, by SIGTERM to torchrun in its training, and finished by one process."""
    out, work = tmp_path / "out", tmp_path / "out" / ".work"
    command = Command(victim.arguments(out), tmp_path / "first")
    command.wait_for((work / "int4" / "block-0000.safetensors").is_file)
    command.signal(signal.SIGINT)
    assert command.end() == 130
    alone = {path: path.read_bytes() for path in (work / "int4").iterdir()}
    assert not (work / "int2").exists()

    log, launcher = tmp_path / "second", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with log.open("w") as said:
        torchrun = subprocess.Popen(
            [sys.executable, *launcher, "-m", "upq", *victim.arguments(out, "--device", "cpu")],
            stdout=said,
            stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        limit = time.monotonic() + 300
        while not (work / "distill.safetensors").is_file():
            assert torchrun.poll() is None, log.read_text()
            assert time.monotonic() < limit, log.read_text()
            time.sleep(0.001)
        torchrun.send_signal(signal.SIGTERM)
        assert torchrun.wait(120) != 0
    finally:
        torchrun.terminate()  # which ends its workers too; nothing where it has ended
        torchrun.wait(120)
    assert {path: path.read_bytes() for path in alone} == alone
    assert len(list((work / "int4").iterdir())) == len(list((work / "int2").iterdir())) == BLOCKS
    assert not (out / ".lock").exists()
    step = load_metadata(work / "distill.safetensors")["step"]
    assert f"stopped after step {step - 1};" in log.read_text()
    assert log.read_text().count("stopped by SIGTERM") == 2

    command = Command(victim.arguments(out), tmp_path / "third")
    assert command.end() == 0, command.said()
    assert f"resumed the training at step {step}" in command.said()
    assert RECIPE["distill"]["checkpoint_every"] <= step < 24
    found, expected = (json.loads((folder / "upq.json").read_text())["metrics"] for folder in (out, unharmed.out))
    for row, figures in expected.items():
        numbers = {key: value for key, value in figures.items() if not isinstance(value, str)}
        assert {key: found[row][key] for key in numbers} == pytest.approx(numbers, rel=0.02), row

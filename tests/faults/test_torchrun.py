"""torchrun: the same directory goes from one process to two and back, and a signal to the launcher saves the step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from upq.files.tensors import load_metadata
from victim import BLOCKS, RECIPE, STEPS, Command, Unharmed, Victim, outcome

pytestmark = pytest.mark.soak  # ten fresh Pythons under torchrun itself; test_pipeline has two processes without it

ONE = [sys.executable, "-m", "upq"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "upq"]
# Conversations in some ten batches, and stages after them that sum nothing up over processes.
WRITES = (
    "--set", "data.generated.tokens=2000", "--set", "data.generated.batch_size=4", "--set", "int4=null",
    "--set", "int2.method={name: rtn, scale: max}", "--set", "distill.tokens=0", "--keep-work", "--device", "cpu",
)  # fmt: skip


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """What is said goes to `log`. A launcher that still runs at the end is ended, and its workers with it."""
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.terminate()
        process.wait(120)


def wait_for(process: subprocess.Popen[bytes], arrived: Callable[[], object], log: Path) -> None:
    limit = time.monotonic() + 300
    while not arrived():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.001)


def test_from_one_process_to_two_and_back(victim: Victim, unharmed: Unharmed, tmp_path: Path) -> None:
    """Stopped by Ctrl-C in its INT4 stage, by SIGTERM to torchrun in its training, and finished by one process."""
    out, work = tmp_path / "out", tmp_path / "out" / ".work"
    command = Command(victim.arguments(out), tmp_path / "first")
    command.wait_for((work / "int4" / "block-0000.safetensors").is_file)
    command.signal(signal.SIGINT)
    assert command.end() == 130
    alone = {path: path.read_bytes() for path in (work / "int4").glob("block-*")}
    assert not (work / "int2").exists()

    log = tmp_path / "second"
    with started([*TWO, *victim.arguments(out, "--device", "cpu")], log) as torchrun:
        wait_for(torchrun, (work / "distill/checkpoint.safetensors").is_file, log)
        torchrun.send_signal(signal.SIGTERM)
        assert torchrun.wait(120) != 0
    assert {path: path.read_bytes() for path in alone} == alone
    assert all(len(list((work / name).glob("block-*"))) == BLOCKS for name in ("int4", "int2"))
    assert not (out / ".lock").exists()
    step = load_metadata(work / "distill/checkpoint.safetensors")["step"]
    assert f"stopped after step {step - 1};" in log.read_text()
    assert log.read_text().count("stopped by SIGTERM") == 2

    command = Command(victim.arguments(out), tmp_path / "third")
    assert command.end() == 0, command.said()
    assert f"resumed the training at step {step}" in command.said()
    assert RECIPE["distill"]["checkpoint_every"] <= step < STEPS
    found, expected = (json.loads((folder / "upq.json").read_text())["metrics"] for folder in (out, unharmed.out))
    for row, figures in expected.items():
        numbers = {key: value for key, value in figures.items() if not isinstance(value, str)}
        assert {key: found[row][key] for key in numbers} == pytest.approx(numbers, rel=0.02), row


def test_two_processes_write_the_conversations_of_one(victim: Victim, tmp_path: Path) -> None:
    """One of them killed on the way and both begun again, the model now in shards: the same files and artefact."""
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    sharded = (*WRITES, "--set", "memory.weights=sharded")
    with started([*TWO, *victim.arguments(two, *WRITES)], log) as torchrun:
        wait_for(torchrun, lambda: list(two.glob(".work/generate/batches/000002.jsonl")), log)
        os.kill(json.loads((two / ".lock").read_text())["pid"], signal.SIGKILL)
        assert torchrun.wait(120) != 0
    left = len(list(two.glob(".work/generate/batches/*.jsonl")))
    for to_the_end in ([*TWO, *victim.arguments(two, *sharded)], [*ONE, *victim.arguments(one, *sharded)]):
        with started(to_the_end, log) as process:
            assert process.wait(300) == 0, log.read_text()
    found, expected = outcome(two), outcome(one)
    files = [name for name in expected if name.startswith(".work/generate/")]
    assert 3 <= left < len(files)
    assert [name for name in found if name.startswith(".work/generate/")] == files
    # Clocks are in run.json and stage.json; the paths of the sources, of the conversations too, in the packed tokens.
    apart = {".work/run.json", ".work/tokens.safetensors"} | {name for name in expected if "/stage.json" in name}
    assert {name for name in expected if found.get(name) != expected[name]} <= apart
    assert found.keys() == expected.keys()

"""Ctrl-C and SIGTERM: the exit code says which, what was done is saved, and the same command goes on."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import torch

import upq.cli
from upq.core.signals import Stop, Stopped
from upq.files.tensors import load_metadata, load_tensors, save_tensors
from victim import RECIPE, Command, Unharmed, Victim, outcome


def test_interrupted_then_terminated_then_finished(victim: Victim, unharmed: Unharmed, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    work = out / ".work"

    command = Command(victim.arguments(out), log)
    command.wait_for((work / "int4" / "block-0001.safetensors").is_file)
    command.signal(signal.SIGINT)
    assert command.end() == 130, command.said()
    assert "stopped by SIGINT" in command.said()
    assert "Traceback" not in command.said()
    assert not (out / ".lock").exists()
    assert not (work / "distill/checkpoint.safetensors").exists()

    command = Command(victim.arguments(out), log)
    command.wait_for((work / "distill/checkpoint.safetensors").is_file)
    command.signal(signal.SIGTERM)
    assert command.end() == 143, command.said()
    assert "stopped by SIGTERM" in command.said()
    step = load_metadata(work / "distill/checkpoint.safetensors")["step"]
    # The step that was under way is in the checkpoint.
    assert f"stopped after step {step - 1};" in command.said()

    command = Command(victim.arguments(out), log)
    assert command.end() == 0, command.said()
    assert f"resumed the training at step {step}" in command.said()
    assert "taken over" not in command.said()  # both have let go of the lock
    assert outcome(out) == unharmed.outcome
    assert step >= RECIPE["distill"]["checkpoint_every"]


def test_a_request_waits_only_while_it_is_held_and_only_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped, match="SIGINT"):
        Stop().request(signal.SIGINT)
    stop, reached = Stop(), []
    with pytest.raises(Stopped, match="SIGTERM") as caught, stop.held():  # noqa: PT012
        stop.request(signal.SIGTERM)
        reached.append("the end of what was held")
    assert reached
    assert caught.value.exit_code == 143
    assert "the same signal again stops at once" in capfd.readouterr().err
    stop = Stop()
    with pytest.raises(Stopped, match="SIGINT") as caught, stop.held():  # noqa: PT012
        stop.request(signal.SIGTERM)
        stop.request(signal.SIGINT)
        pytest.fail("the second request did not stop it")
    assert caught.value.exit_code == 130


def test_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop().listening():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_are_the_callers_own_again_afterwards() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped, match="SIGTERM"), Stop().listening():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_library_that_turns_a_request_into_its_own_error_does_not_hide_it() -> None:
    """safetensors does, where the signal comes while it reads a tensor."""
    with pytest.raises(Stopped, match="SIGTERM") as caught, Stop().listening():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        except Stopped as stopped:
            raise ValueError("could not determine the shape") from stopped
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="truly"), Stop().listening():
        raise ValueError("truly")


def test_a_request_that_a_library_drops_is_heeded_at_the_next_step() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), Stop().listening() as stop:  # noqa: PT012
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        with stop.held():
            assert stop.signum == signal.SIGTERM  # the training looks at it after a step


def test_interrupted_while_it_reads_tensors(tmp_path: Path) -> None:
    """At random moments of reading: always Stopped, whatever safetensors made of it."""
    save_tensors(tmp_path / "many.safetensors", {f"t{i}": torch.zeros(16, 16) for i in range(20)})
    moment = random.Random(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for _ in range(60):
        with pytest.raises(Stopped), Stop().listening(signal.SIGALRM):  # noqa: PT012
            signal.setitimer(signal.ITIMER_REAL, moment.uniform(1e-5, 3e-3))
            while True:
                load_tensors(tmp_path / "many.safetensors")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("swallowed", [False, True])
def test_any_command_ends_in_one_line(
    signum: signal.Signals, swallowed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a library makes another error of what a handler raises, too."""

    def command() -> None:
        try:
            signal.raise_signal(signum)
        except BaseException as error:
            if swallowed:
                raise ValueError("could not determine the shape of object type") from error
            raise

    monkeypatch.setattr(upq.cli, "app", command)
    before = signal.signal(signum, signal.SIG_DFL)  # Ctrl-C is ignored where the tests run in the background
    try:
        with pytest.raises(SystemExit) as stopped:
            upq.cli.main()
    finally:
        signal.signal(signum, before)
    assert stopped.value.code == 128 + signum
    said = capsys.readouterr().err
    assert said.startswith(f"stopped by {signum.name}")
    assert said.count("\n") == 1

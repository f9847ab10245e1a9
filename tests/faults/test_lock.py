"""Two processes on one directory: the second one's error names the first; the lock of a dead one is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from upq.core.errors import UPQError
from upq.files.lock import lock
from victim import Command, Unharmed, Victim, outcome


def notes(path: Path) -> list[str]:
    """Take the lock and let go of it: what was noted."""
    said: list[str] = []
    with lock(path, said.append):
        assert path.is_file()
    assert not path.exists()
    return said


def left_behind(path: Path, **changes: Any) -> dict[str, Any]:
    """A lock whose owner has not let go of it, as a kill leaves it."""
    path.unlink(missing_ok=True)
    with lock(path, print):
        record: dict[str, Any] = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(record))
    return record


def test_the_second_run_is_refused_and_the_first_is_not_disturbed(
    victim: Victim, unharmed: Unharmed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = Command(victim.arguments(out), tmp_path / "first")
    first.wait_for((out / ".work" / "int4" / "block-0000.safetensors").is_file)
    first.signal(signal.SIGSTOP)  # so that it cannot be finished before the second has come
    second = Command(victim.arguments(out), tmp_path / "second")
    code = second.end()
    first.signal(signal.SIGCONT)
    assert code == 2
    assert f"in use by process {first.pid} on " in second.said()
    assert "wait for it or stop it, or use another --out" in second.said()
    assert second.said().count("\n") == 1
    assert first.end() == 0, first.said()
    assert outcome(out) == unharmed.outcome


def test_one_holds_it_and_it_goes_with_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with lock(path, print):
        with pytest.raises(UPQError, match=rf"new: in use by process {os.getpid()} on .*another --out") as caught:
            notes(path)
        assert "\n" not in str(caught.value)
        assert path.is_file()  # a refused process removes nothing
    assert notes(path) == []


@pytest.mark.parametrize("written", ["", "{", '{"pid": 1}'])
def test_a_record_half_written_belongs_to_nobody(tmp_path: Path, written: str) -> None:
    (tmp_path / "lock").write_text(written)
    assert notes(tmp_path / "lock") == []


def test_a_lock_that_its_owner_has_left_is_taken_over(tmp_path: Path) -> None:
    left_behind(tmp_path / "lock", pid=4_000_000)
    (note,) = notes(tmp_path / "lock")
    assert "taken over from process 4000000 on" in note


def test_after_a_new_start_of_the_machine_and_from_another_container_too(tmp_path: Path) -> None:
    left_behind(tmp_path / "lock", boot="another boot")
    assert "taken over" in notes(tmp_path / "lock")[0]
    left_behind(tmp_path / "lock", host="container-7")  # the same kernel, so its locks are seen
    assert "taken over" in notes(tmp_path / "lock")[0]


def test_another_machine_may_still_be_at_work(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    left_behind(path, host="node7", boot="another boot")
    before = path.read_bytes()
    with pytest.raises(UPQError, match=rf"process \d+ on node7 .*if that run is over, delete {path} and run") as caught:
        notes(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    path.unlink()
    assert notes(path) == []


def test_a_file_that_goes_between_opening_and_locking_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, calls = tmp_path / "lock", fcntl.flock, []

    def flock(file: int, how: int) -> None:
        calls.append(file)
        if len(calls) == 1:
            path.unlink()  # its owner is done just now
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(path, print):
        assert len(calls) == 2
        assert path.is_file()


def test_without_locks_in_the_file_system_the_record_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    path = tmp_path / "lock"
    assert "has no locks" in notes(path)[0]
    left_behind(path)  # by this process, which runs
    with pytest.raises(UPQError, match=rf"in use by process {os.getpid()} .*delete {path} if"):
        notes(path)
    left_behind(path, pid=4_000_000)  # more than there are
    assert "taken over" in notes(path)[1]

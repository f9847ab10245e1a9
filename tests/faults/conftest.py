from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from victim import Command, Unharmed, Victim, make_victim, outcome


@pytest.fixture(scope="session")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return make_victim(tmp_path_factory.mktemp("victim"))


@pytest.fixture(scope="session")
def unharmed(victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> Unharmed:
    folder = tmp_path_factory.mktemp("unharmed")
    command = Command(victim.arguments(folder / "out"), folder / "log")
    assert command.end() == 0, command.said()
    return Unharmed(folder / "out", outcome(folder / "out"), command.operations())


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A file system of `size` bytes in memory; with `at`, the one there mounted anew (`readonly`)."""
    mounted: list[Path] = []

    def make(size: int = 1 << 24, *, at: Path | None = None, readonly: bool = False) -> Path:
        place = at or tmp_path / f"disk{len(mounted)}"
        place.mkdir(exist_ok=True)
        options = f"{'remount,' if at else ''}{'ro' if readonly else 'rw'},size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs the right to mount a small file system")
        if at is None:
            mounted.append(place)
        return place

    yield make
    for place in mounted:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", "-l", str(place)], check=True)

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ranked import launch
from upq import kernels


@pytest.fixture
def reference() -> Iterator[None]:
    """Products of packed layers through the reference kernels: the default rounds activations to int8."""
    with kernels.computing("reference"):
        yield


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, by module, of what two processes have done (tests/ranked.py)."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder)
    return folder

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# One worker a core: a second thread of a worker takes another's core. Tests of threads set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch and upq are imported in the fixtures: pytest-xdist's own process reads this file too, and needs neither (8 s).


def pytest_collection_finish() -> None:
    """What is imported by now is never garbage. A run collects after each stage: 0.4 s, a fifth of a small run."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or nanobind reports all that as leaks


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """A law that asks for it holds on a GPU as well."""
    import torch

    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return name


@pytest.fixture
def reference() -> Iterator[None]:
    """Products of packed layers through the reference kernels: the default rounds activations to int8."""
    from upq import kernels

    with kernels.computing("reference"):
        yield


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, by module, of what two processes have done (tests/ranked.py)."""
    from ranked import launch

    folder = tmp_path_factory.mktemp("two")
    launch(folder)
    return folder

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# One test worker a core: a second thread in any of them only takes the core of another. Tests of threads set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from ranked import launch
from upq import kernels

torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """A law that asks for it holds on a GPU as well."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return name


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

from __future__ import annotations

from collections.abc import Iterator

import pytest

from upq import kernels


@pytest.fixture
def reference() -> Iterator[None]:
    """Products of packed layers through the reference kernels: the default rounds activations to int8."""
    with kernels.computing("reference"):
        yield

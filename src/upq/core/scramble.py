"""Pseudo-random numbers as functions of their place (splitmix64): the same on every machine and in every version."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEP = np.uint64(0x9E3779B97F4A7C15)


def scramble(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """64-bit numbers, one for each value."""
    with np.errstate(over="ignore"):
        mixed: NDArray[np.uint64] = _mix((values + np.uint64(1) + _mix(np.uint64(seed % 2**64))) * _STEP)
        return mixed


def uniform(seeds: NDArray[np.uint64], steps: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers from [0, 1): of each seed's sequence (splitmix64's own) the one at its step, from 0."""
    with np.errstate(over="ignore"):
        mixed: NDArray[np.uint64] = _mix(seeds + (steps + np.uint64(1)) * _STEP)
        numbers: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)
        return numbers


def _mix(z: Any) -> Any:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

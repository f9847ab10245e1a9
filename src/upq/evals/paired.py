"""Two models on the same items: the mean of their differences, its interval, and an exact test for right and wrong.

The only module that imports scipy (pip install 'upq[report]').
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from upq.core.errors import UPQError

RESAMPLES = 10_000
LEVEL = 0.95
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """B minus A, over `items`. `p`, `only_a` and `only_b` are of items that one has right and the other wrong."""

    items: int
    mean_a: float
    mean_b: float
    difference: float
    low: float  # of the interval at LEVEL
    high: float
    p: float | None = None
    only_a: int | None = None
    only_b: int | None = None

    @property
    def shown(self) -> bool:
        """Whether there is a difference at LEVEL: by the exact test where there is one, else by the interval."""
        return self.p < 1 - LEVEL if self.p is not None else not self.low <= 0 <= self.high


def check_packages() -> None:
    """Before hours of work. Raises UPQError."""
    try:
        import scipy
    except ImportError:
        raise UPQError("a comparison needs scipy: pip install 'upq[report]'") from None
    del scipy


def paired(scores_a: Sequence[float], scores_b: Sequence[float], *, seed: int = 0) -> Paired:
    """Percentile bootstrap (Efron, 1979) over items; McNemar's exact test (1947) where scores are 0 or 1."""
    from scipy.stats import binomtest, bootstrap

    a_N, b_N = np.asarray(scores_a, float), np.asarray(scores_b, float)
    assert len(a_N) == len(b_N) > 0
    difference_N = b_N - a_N
    low = high = float(difference_N.mean())
    if len(difference_N) < 2:
        low, high = -math.inf, math.inf
    elif difference_N.any():
        found = bootstrap(
            (difference_N,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=max(1, 10_000_000 // len(difference_N)),
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
    exact: dict[str, float] = {}
    if set(np.unique([a_N, b_N])) <= {0.0, 1.0}:
        only_a, only_b = int((a_N > b_N).sum()), int((b_N > a_N).sum())
        discordant = only_a + only_b
        p = float(binomtest(only_b, discordant).pvalue) if discordant else 1.0
        exact = {"p": p, "only_a": only_a, "only_b": only_b}
    return Paired(
        items=len(a_N),
        mean_a=float(a_N.mean()),
        mean_b=float(b_N.mean()),
        difference=float(difference_N.mean()),
        low=low,
        high=high,
        **exact,  # type: ignore[arg-type]
    )

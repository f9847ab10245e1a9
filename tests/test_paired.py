"""Two models on the same items: the exact test by its definition, intervals that hold what they promise, loops."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed: pip install 'upq[report]'")

from upq.evals.items import items_of, loops
from upq.evals.paired import holm, paired


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 3), (2, 9), (14, 3), (0, 6)])
def test_mcnemar_is_its_definition(only_a: int, only_b: int) -> None:
    a = [1.0] * only_a + [0.0] * only_b + [1.0] * 5 + [0.0] * 4
    b = [0.0] * only_a + [1.0] * only_b + [1.0] * 5 + [0.0] * 4
    found, n, few = paired(a, b), only_a + only_b, min(only_a, only_b)
    assert found.p == pytest.approx(min(1.0, 2 * sum(comb(n, k) for k in range(few + 1)) / 2**n))
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.difference == pytest.approx((only_b - only_a) / (n + 9))


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 3), (2, 9), (14, 3), (0, 6)])
def test_odds_are_those_of_matched_pairs(only_a: int, only_b: int) -> None:
    """Exact: at either end of the interval, so many discordant items or more (or fewer) have a chance of 2.5 %."""
    found = paired([1.0] * only_a + [0.0] * only_b + [1.0], [0.0] * only_a + [1.0] * only_b + [1.0])
    n = only_a + only_b
    assert found.odds == (only_b / only_a if only_a else None)

    def at_least(odds: float, k: int) -> float:
        share = odds / (1 + odds)
        return sum(comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k, n + 1))

    assert found.odds_low is not None
    if only_b:
        assert at_least(found.odds_low, only_b) == pytest.approx(0.025)
    else:
        assert found.odds_low == 0
    if only_a:
        assert found.odds_high is not None
        assert 1 - at_least(found.odds_high, only_b + 1) == pytest.approx(0.025)
    else:
        assert found.odds_high is None


def test_holm_is_its_definition() -> None:
    """Rejected by the adjusted values: as stepping down through the sorted ones does, for every level."""
    values = [0.01, 0.04, 0.03, 0.005, 0.5]
    assert holm(values) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])
    assert holm([]) == []
    for level in np.linspace(0.001, 0.6, 60):
        rejected, ordered = set[float](), sorted(values)
        for rank, value in enumerate(ordered):
            if value > level / (len(values) - rank):
                break
            rejected.add(value)
        assert {value for value, p in zip(values, holm(values), strict=True) if p <= level} == rejected


def test_a_model_and_itself() -> None:
    found = paired([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.p, found.difference, found.low, found.high, found.shown) == (1.0, 0.0, 0.0, 0.0, False)
    kld = paired([0.1, 0.3, 0.2], [0.1, 0.3, 0.2])
    assert (kld.p, kld.difference, kld.low, kld.high, kld.shown) == (None, 0.0, 0.0, 0.0, False)


def test_the_interval_is_that_of_the_mean() -> None:
    """On many items the bootstrap's interval is the normal one of the mean difference, within 5 %."""
    rng = np.random.default_rng(0)
    a_N, difference_N = rng.normal(size=400), rng.normal(0.1, 1.0, 400)
    found = paired(a_N.tolist(), (a_N + difference_N).tolist())
    half = 1.96 * difference_N.std(ddof=1) / 20
    assert found.low == pytest.approx(difference_N.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(difference_N.mean() + half, abs=0.05 * half)


def test_few_items_show_no_more_than_many() -> None:
    """Of 400 comparisons without a difference, 5 % show one, give or take three standard errors: with 8 items too.

    The plain percentiles of 8 items would show 10 to 13 %.
    """
    rng = np.random.default_rng(3)
    for items in (8, 100):
        shown = sum(paired([0.0] * items, rng.normal(size=items).tolist()).shown for _ in range(400))
        assert shown / 400 <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5, items


@pytest.mark.parametrize("kind", ["right or wrong", "distances"])
def test_two_seeds_show_no_difference_and_worse_ones_do(kind: str) -> None:
    """Models of one quality differ in at most 2 of 20 tries at 95 %; one that is worse differs in each."""
    rng, shown = np.random.default_rng(1), 0
    for _ in range(20):
        hard_N = rng.normal(size=300)  # what both find hard
        if kind == "distances":
            same = [np.exp(hard_N + rng.normal(0, 0.3, 300)).tolist() for _ in range(2)]
            worse = np.exp(hard_N + 0.5).tolist()
        else:
            same = [(hard_N + rng.normal(0, 0.5, 300) < 1).astype(float).tolist() for _ in range(2)]
            worse = (hard_N + rng.normal(0, 0.5, 300) < 0).astype(float).tolist()
        shown += paired(*same).shown
        assert paired(same[0], worse).shown
    assert shown <= 2


def test_one_item_shows_nothing() -> None:
    assert not paired([0.2], [0.9]).shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The river runs north to the old bridge, and the bridge leads to the town.", False),
        ("The river. " * 5, True),
        ("It is so. " + "a" * 60, True),
        ("na " * 5, False),  # too short to say
        ("ABCDEFGHIJKLMNOPQRSTUVWXYZ " * 3, False),
        ("ABCDEFGHIJKLMNOPQRSTUVWXYZ " * 4 + "  \n", True),
        ("word " * 20 + "and then it ends as it should.", False),
        ("", False),
    ],
)
def test_loops(text: str, expected: bool) -> None:
    assert loops(text) is expected


def test_items_of_samples() -> None:
    """Of lm-eval's samples: the likeliest option and the written answer, every measure that is a number."""
    choice = {
        "doc_id": 3,
        "arguments": [("Q", " a"), ("Q", " b")],
        "resps": [[(-2.0, False)], [(-1.0, True)]],
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "acc": 1.0,
        "acc_norm": 0.0,
    }
    written = {
        "doc_id": 0,
        "arguments": [("Write.", {"until": []})],
        "resps": [["so " * 30]],
        "filter": "strict",
        "metrics": ["exact", "each"],
        "exact": False,
        "each": [True, False],
    }
    acc, norm, exact = items_of("all", {"mmlu": [choice], "ifeval": [written]}, None)
    assert (acc.key, acc.answer, acc.score, acc.loops) == (("mmlu", "acc", 3), " b", 1.0, False)
    assert acc.asked == "all"
    assert (norm.measure, norm.score) == ("acc_norm", 0.0)
    assert (exact.measure, exact.score, exact.loops, exact.question) == ("exact,strict", 0.0, True, "Write.")

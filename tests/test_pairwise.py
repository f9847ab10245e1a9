"""Fewer cases, and no pair of values that does not meet."""

from __future__ import annotations

import itertools

import pytest

from pairwise import covering, pairwise


@pytest.mark.parametrize("sizes", [(2, 2), (7, 3), (2, 2, 2), (3, 3, 3, 3), (7, 3, 2, 3, 4), (1, 5, 1, 2)])
def test_every_pair_of_values_meets(sizes: tuple[int, ...]) -> None:
    values = [[f"{parameter}{value}" for value in range(size)] for parameter, size in enumerate(sizes)]
    rows = covering(*values)
    for (i, first), (j, second) in itertools.combinations(enumerate(values), 2):
        met = {(row[i], row[j]) for row in rows}
        assert met == set(itertools.product(first, second))
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(rows) <= 1.5 * largest[0] * largest[1]
    assert rows == covering(*values)  # each worker has to collect the same cases


def test_it_parametrises() -> None:
    mark = pairwise(bits=range(2, 4), name="ab").mark
    assert mark.args == (("bits", "name"), [(2, "a"), (2, "b"), (3, "a"), (3, "b")])

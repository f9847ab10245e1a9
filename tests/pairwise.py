"""Few cases in place of a full product: each pair of values of any two parameters still meets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def pairwise(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by two or more parameters, as pytest.mark.parametrize does for each, with `covering` cases."""
    return pytest.mark.parametrize(tuple(values), covering(*map(list, values.values())))


def covering(*values: list[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value each. The next row is the first of those in which most of the missing pairs meet."""
    rows = itertools.product(*(range(len(each)) for each in values))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing, chosen = set[Any]().union(*pairs.values()), []
    while missing:
        chosen.append(max(pairs, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[chosen[-1]]
    return [tuple(each[i] for each, i in zip(values, row, strict=True)) for row in chosen]

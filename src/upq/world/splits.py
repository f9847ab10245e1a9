"""Which questions belong to which split: training, validation and test items share no wording and no combination."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "validation", "test"]

_SHARES = 8  # an eighth for tests, an eighth for validation


def split_of(*parts: object) -> Split:
    """Where the thing named by `parts` belongs, by a checksum of its name: no order of generation can leak one."""
    share = zlib.crc32("/".join(map(str, parts)).encode()) % _SHARES
    return "test" if share == 0 else "validation" if share == 1 else "train"


def divide(names: Sequence[str]) -> dict[Split, tuple[str, ...]]:
    """A small set of names, such as the wordings of one question: an eighth, but at least one, for each test split."""
    ranked = sorted(names, key=lambda name: zlib.crc32(name.encode()))
    n = max(1, len(ranked) // _SHARES)
    return {"test": tuple(ranked[:n]), "validation": tuple(ranked[n : 2 * n]), "train": tuple(ranked[2 * n :])}

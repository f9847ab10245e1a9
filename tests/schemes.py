"""Schemes for laws over all grids: some have one width, one size of groups and one type of scales.

And which grids and methods those are: what has codes of vectors has laws of its own (tests/test_aqlm.py).
"""

from __future__ import annotations

from upq.blockwise import METHODS
from upq.core.scheme import PER_CHANNEL, QuantScheme
from upq.grids import GRIDS

# Grids of any width, any size of groups and the usual types of scales.
PLAIN = [name for name in GRIDS.names() if GRIDS.get(name).widths == range(2, 9) and GRIDS.get(name).uniform]

SCALAR = [name for name in GRIDS.names() if not GRIDS.get(name).vectors]
ROUNDING = [name for name in METHODS.names() if not METHODS.get(name).vectors]


def fitting(name: str, *, bits: int = 2, group_size: int = PER_CHANNEL, scale_dtype: str = "float16") -> QuantScheme:
    """The wish, with what the grid has in the place of what it has not."""
    grid = GRIDS.get(name)
    return QuantScheme(
        bits=bits if bits in grid.widths else grid.widths[0],
        group_size=group_size if not grid.group_sizes or group_size in grid.group_sizes else grid.group_sizes[0],
        grid=name,
        scale_dtype=scale_dtype if scale_dtype in grid.scale_dtypes else grid.scale_dtypes[0],
    )

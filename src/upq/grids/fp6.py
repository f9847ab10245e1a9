"""FP6 of ZeroQuant(4+2) (arXiv 2312.08583): E3M2 levels, 0.0625 to 28, one scale a row. 6 bits a weight.

A code placed in a float16, the sign on the sign and the other five bits on bits 8 to 12, is the level over 2^12,
subnormals included: fp6_llm's kernels decode so. No engine that UPQ exports to has the type.
"""

from __future__ import annotations

from upq.core.levels import E3M2
from upq.grids._base import GRIDS
from upq.grids._table import TableGrid


class Fp6(TableGrid):
    """Parameter `log_scale` (O, G)."""

    widths = (6,)
    values = E3M2


GRIDS.register("fp6")(Fp6())

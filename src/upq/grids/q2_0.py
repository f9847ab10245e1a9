"""Symmetric integers with one level more above zero than below: -1, 0, 1, 2 at 2 bits, as llama.cpp's Q2_0 and TQ2_0.

The mirror image of `sym`.
"""

from __future__ import annotations

from upq.core.scheme import QuantScheme
from upq.grids._base import GRIDS
from upq.grids.sym import Sym


class Q2_0(Sym):
    """Parameter `log_scale` (O, G); the zero point is 2^(b-1) - 1 everywhere."""

    def zero(self, scheme: QuantScheme) -> float:
        return scheme.levels / 2 - 1


GRIDS.register("q2_0")(Q2_0())

"""Quantisation grids: differentiable maps from a float weight to a QTensor. One file each."""

from upq.core.scales import SMALLEST_SCALE
from upq.grids._base import (
    GRIDS,
    OUTER,
    ZERO,
    Grid,
    Params,
    check_scheme,
    learned,
    scheme_of,
    stored_scale,
    stretches_of_rows,
)
from upq.grids._search import search_scale
from upq.grids._table import nearest

__all__ = [
    "GRIDS",
    "OUTER",
    "SMALLEST_SCALE",
    "ZERO",
    "Grid",
    "Params",
    "check_scheme",
    "learned",
    "nearest",
    "scheme_of",
    "search_scale",
    "stored_scale",
    "stretches_of_rows",
]

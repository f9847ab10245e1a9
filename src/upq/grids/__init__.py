"""Quantisation grids: differentiable maps from a float weight to a QTensor. One file each."""

from upq.grids._base import GRIDS, SMALLEST_SCALE, ZERO, Grid, Params, stored_scale, stretches_of_rows
from upq.grids._search import search_scale

__all__ = ["GRIDS", "SMALLEST_SCALE", "ZERO", "Grid", "Params", "search_scale", "stored_scale", "stretches_of_rows"]

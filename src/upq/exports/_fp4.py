"""Weights on E2M1 levels, which other formats know as NVFP4 and MXFP4."""

from __future__ import annotations

from typing import Literal

import torch

from upq.core.levels import E2M1, Table
from upq.core.scheme import QuantScheme
from upq.exports._source import Weight
from upq.grids import GRIDS

Fp4 = Literal["nvfp4", "mxfp4"]
_KINDS: dict[tuple[str, int], Fp4] = {("e4m3", 16): "nvfp4", ("e8m0", 32): "mxfp4"}  # by type of scales and group


def fp4(scheme: QuantScheme) -> Fp4 | None:
    """What others call this scheme, or None: by its levels and scales, whatever the grid's name."""
    levels = GRIDS.get(scheme.grid).shared(scheme)
    if not isinstance(levels, Table) or levels.values.tolist() != list(E2M1):
        return None
    return _KINDS.get((scheme.scale_dtype, scheme.group_size))


def outer(weight: Weight) -> float:
    """The outer scale of an NVFP4 weight."""
    found = weight.outer(0, 1)
    assert found is not None
    return found.item()


def misfit(weight: Weight) -> str | None:
    """Why engines that multiply the factors in another order round the weight, or None."""
    assert weight.scheme is not None
    if weight.scheme.scale.outer is not None and torch.frexp(torch.tensor(outer(weight)))[0] != 0.5:
        return "its outer scale is no power of two"
    return None

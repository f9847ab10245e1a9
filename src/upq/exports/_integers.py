"""A QTensor as d·k with integers k, for formats that have no zero point or only whole ones.

    (code - zero)·scale = k·d,   k = h·(code - zero),   d = scale/h,   h = 2 where zero is a half integer, else 1

SEQ at 2 bits is d·{-3, -1, 1, 3}. The halving is exact in binary unless it falls below the smallest subnormal number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upq.core.precision import dtype_name
from upq.core.scheme import QTensor
from upq.exports._source import Weight


def step(zero_OG: Tensor) -> Tensor:
    """h: 2 where the zero point is no integer, else 1."""
    return (zero_OG.frac() != 0).float() + 1


def misfit(weight: Weight, dtype: torch.dtype) -> str | None:
    """Why d·k with d in `dtype` is not exactly this weight, or None."""
    scale_OG, zero_OG = weight.scale_zero()
    step_OG = step(zero_OG)
    if (step_OG * zero_OG).frac().any():
        return "a zero point is neither an integer nor a half"
    if not torch.equal((scale_OG.float() / step_OG).to(dtype).float() * step_OG, scale_OG.float()):
        return f"a scale has no exact place in {dtype_name(dtype)}"
    return None


def bounds(weight: Weight) -> tuple[int, int]:
    """The least and the greatest k that the scheme allows."""
    assert weight.scheme is not None
    return span(weight.scale_zero()[1], weight.scheme.levels)


def span(zero_OG: Tensor, levels: int) -> tuple[int, int]:
    """The least and the greatest k of `levels` codes."""
    step_OG = step(zero_OG)
    return int(-(step_OG * zero_OG).max()), int((step_OG * (levels - 1 - zero_OG)).max())


def bits(weight: Weight) -> int:
    """Bits of the two's complement integers that hold every k."""
    low, high = bounds(weight)
    return max((-low - 1).bit_length(), high.bit_length()) + 1


def integers(q: QTensor) -> Tensor:
    """k, int16 (O, I)."""
    o, i = q.codes_OI.shape
    step_OG1 = step(q.zero_OG)[..., None]
    codes_OGS = q.codes_OI.view(o, q.scale_OG.shape[1], -1).float()
    return (step_OG1 * (codes_OGS - q.zero_OG[..., None])).to(torch.int16).view(o, i)


def unit(q: QTensor, dtype: torch.dtype) -> Tensor:
    """d (O, G) in `dtype`."""
    return (q.scale_OG.float() / step(q.zero_OG)).to(dtype)

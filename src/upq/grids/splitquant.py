"""SplitQuantV2 (arXiv 2503.07657): a matrix as the sum of three, each of 4-bit integers with one scale and zero point.

k-means, k = 3, on the values of the matrix; each part holds those of one cluster, and zeros. With parts of their own,
compilers that know one scale a tensor have 48 levels in the place of 16. A code is 16·part + the part's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from upq.core.levels import Levels, Table
from upq.core.scheme import PER_CHANNEL, QTensor, QuantScheme
from upq.grids._base import GRIDS, SMALLEST_SCALE, Grid, Params, stored_scale, stretches_of_rows

PARTS, CODES = 3, 16  # matrices, and codes of each
RATIOS = ("low_ratio", "high_ratio")  # scales of the outer parts over the middle one's
ZEROS = ("low_zero", "middle_zero", "high_zero")
_BINS = 4096  # of the histogram that is clustered
_ROUNDS = 100


@dataclass(frozen=True)
class SplitQuant(Grid):
    """Parameters `log_scale`, the middle part's, and what RATIOS and ZEROS name, each (O, 1); none learns.

    A ratio has eight significant bits (bfloat16), so that ratio · scale · integer is exact in float32. A weight takes
    the nearest level of all three parts, where the paper's takes that of its own cluster's.
    """

    parts: tuple[tuple[float, int], ...] | None = None  # scale and zero point of each, of the matrix it is settled for

    widths = (6,)
    scale_dtypes = ("float16", "bfloat16")
    group_sizes = (PER_CHANNEL,)
    uniform = False
    fixed = frozenset({"log_scale", *RATIOS, *ZEROS})
    scales_learn = False

    def settled(self, weights: Iterable[Tensor]) -> Self:
        matrices = list(weights)
        # Matrices that engines join keep parts of their own: the engines that this is for join none.
        return type(self)(_parts(matrices[0])) if self.parts is None and len(matrices) == 1 else self

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        parts = self.settled([w_OI.detach()]).parts
        assert parts is not None
        (low, _), (middle, _), (high, _) = parts
        stored = scheme.scale.decode(scheme.scale.encode(torch.tensor(middle))).item()
        values = dict(zip(RATIOS, (low / stored, high / stored), strict=True))
        values |= {name: float(zero) for name, (_, zero) in zip(ZEROS, parts, strict=True)}
        params = {"log_scale": torch.tensor(middle).log().item()} | values
        return {name: torch.full((len(w_OI), 1), value, device=w_OI.device) for name, value in params.items()}

    def candidates(self, w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor) -> Iterator[Params]:
        """None: as published, each part's levels cover its range."""
        return iter(())

    def scale_and_levels(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Levels]:
        scale_O1 = stored_scale(params["log_scale"].exp(), scheme)
        return scale_O1, _levels({name: params[name].to(dtype) for name, dtype in self.beside(scheme).items()})

    def fake(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        w_OI = w_OI.float()
        scale_O1, levels = self.scale_and_levels(params, scheme)
        assert isinstance(levels, Table)
        levels_OL = levels.values[:, 0] * scale_O1
        low_O1, high_O1 = levels_OL.aminmax(dim=-1, keepdim=True)
        inside_OI = torch.minimum(torch.maximum(w_OI, low_O1), high_O1)
        # `x - x.detach()` is exactly 0, so the value is the level's.
        return levels_OL.gather(-1, _nearest(w_OI.detach(), levels_OL)) + (inside_OI - inside_OI.detach())

    @torch.no_grad()
    def codes(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        scale_O1, levels = self.scale_and_levels(params, scheme)
        assert isinstance(levels, Table)
        return _nearest(w_OI.float(), levels.values[:, 0] * scale_O1).to(torch.uint8)

    def beside(self, scheme: QuantScheme) -> dict[str, torch.dtype]:
        return dict.fromkeys(RATIOS, torch.bfloat16) | dict.fromkeys(ZEROS, torch.uint8)

    def store_levels(self, q: QTensor) -> dict[str, Tensor]:
        assert isinstance(q.levels, Table)
        values_OGPC = q.levels.values.view(*q.scale_OG.shape, PARTS, CODES)
        ratios_OGP = values_OGPC[..., 1] - values_OGPC[..., 0]  # exact, as are the quotients
        zeros_OGP = -values_OGPC[..., 0] / ratios_OGP
        stored = (ratios_OGP[..., 0], ratios_OGP[..., 2], *zeros_OGP.unbind(-1))
        return {
            name: value.to(dtype) for (name, dtype), value in zip(self.beside(q.scheme).items(), stored, strict=True)
        }

    def load_levels(self, beside: dict[str, Tensor], scale_OG: Tensor, scheme: QuantScheme) -> Levels:
        return _levels(beside)


def _levels(beside: dict[str, Tensor]) -> Table:
    """(O, 1, 48), in units of the middle part's scale."""
    low_O1, high_O1 = (beside[name].float() for name in RATIOS)
    codes_L = torch.arange(CODES, device=low_O1.device).float()
    ratios = (low_O1, torch.ones_like(low_O1), high_O1)
    zipped = zip(ratios, ZEROS, strict=True)
    parts = [ratio_O1[..., None] * (codes_L - beside[name].float()[..., None]) for ratio_O1, name in zipped]
    return Table(torch.cat(parts, dim=-1))


def _nearest(w_OI: Tensor, levels_OL: Tensor) -> Tensor:
    """Codes, int64. A tie goes down; of equal levels the one of the lowest code is taken."""
    sorted_OL, codes_OL = levels_OL.sort(dim=-1, stable=True)
    edges_OL = (sorted_OL[:, 1:] + sorted_OL[:, :-1]) / 2
    places_OL = torch.arange(levels_OL.shape[-1], device=levels_OL.device).expand_as(codes_OL)
    first_OL = torch.where(sorted_OL.diff(dim=-1, prepend=sorted_OL[:, :1] - 1) > 0, places_OL, 0).cummax(-1).values
    return codes_OL.gather(-1, first_OL).gather(-1, torch.searchsorted(edges_OL, w_OI.contiguous()))


def _parts(w_OI: Tensor) -> tuple[tuple[float, int], ...]:
    """Scale and zero point of the parts of a matrix: the range of a cluster's values, with the zero of the others."""
    lowest, highest = (value.item() for value in w_OI.float().aminmax())
    edges = (lowest, *_boundaries(w_OI, lowest, highest), highest)
    found = []
    for start, end in pairwise(edges):
        low, high = min(start, 0.0), max(end, 0.0)
        scale = max((high - low) / (CODES - 1), SMALLEST_SCALE)
        found.append((scale, round(-low / scale)))
    return tuple(found)


def _boundaries(w_OI: Tensor, lowest: float, highest: float) -> tuple[float, float]:
    """Half way between the centres of k-means (Lloyd), from the quantiles 1/6, 1/2 and 5/6, on a histogram."""
    if lowest == highest:
        return lowest, highest
    counts_B = torch.zeros(_BINS, dtype=torch.float64)
    for rows in stretches_of_rows(w_OI):
        counts_B += torch.histc(w_OI[rows].float(), _BINS, lowest, highest).double().cpu()
    values_B = lowest + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * ((highest - lowest) / _BINS)
    share_B = counts_B.cumsum(0) / counts_B.sum()
    centres = values_B[torch.searchsorted(share_B, torch.tensor([1 / 6, 1 / 2, 5 / 6], dtype=torch.float64))]
    for _ in range(_ROUNDS):
        nearest_B = torch.bucketize(values_B, (centres[1:] + centres[:-1]) / 2)
        of_cluster = torch.zeros(PARTS, dtype=torch.float64).index_add(0, nearest_B, counts_B)
        sums = torch.zeros(PARTS, dtype=torch.float64).index_add(0, nearest_B, counts_B * values_B)
        moved = torch.where(of_cluster > 0, sums / of_cluster.clamp_min(1), centres)  # an empty one stays
        if torch.equal(moved, centres):
            break
        centres = moved
    first, second = ((centres[1:] + centres[:-1]) / 2).tolist()
    return first, second


GRIDS.register("splitquant")(SplitQuant())

"""R2Q (arXiv 2511.21736): two signs a weight, ±α1 ± α2. All grids of four levels that are symmetric about zero.

SEQ is the one with α1 = 2·α2. As published, α1 is the mean of |w| and α2 that of what is left; that is worse than SEQ's
searched scale. The search here goes on from there and from SEQ's, taking codes and least squares in turn.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from upq.core.levels import Levels, Table
from upq.core.scheme import QTensor, QuantScheme, to_groups
from upq.grids._base import GRIDS, SMALLEST_SCALE, Grid, Params, stored_scale

_ROUNDS = 20
_LEAST, _MOST = 2.0**-6, 1.0  # of α2/α1: at most 1, or levels would change places
RATIO = "ratio"


class R2q(Grid):
    """Parameters `log_scale` (O, G), of α1, and `ratio` (O, G), α2/α1. `dŴ/dα1` and `dŴ/dα2` are the signs."""

    widths = (2,)
    scale_dtypes = ("float16", "bfloat16")  # the ratio is stored in the same type, and 1 + ratio is exact
    uniform = False

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        seq = GRIDS.get("seq").init(w_OI, _seq(scheme))
        return _from_seq(seq, scheme)

    def scale_and_levels(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Levels]:
        scale_OG = stored_scale(params["log_scale"].exp(), scheme)
        exact_OG = params[RATIO].clamp(_LEAST, _MOST)
        ratio_OG = exact_OG + (exact_OG.to(scheme.scale_torch_dtype).float() - exact_OG).detach()
        return scale_OG, Table(_levels(ratio_OG))

    def fake(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        scale_OG, levels = self.scale_and_levels(params, scheme)
        assert isinstance(levels, Table)
        w_OGS = to_groups(w_OI.float(), scheme)
        edge_OG1 = (levels.values[..., 3] * scale_OG).detach()[..., None]
        inside_OGS = w_OGS.clamp(-edge_OG1, edge_OG1)
        level_OGS = levels.of(_codes(w_OGS.detach(), scale_OG.detach()))
        # `x - x.detach()` is exactly 0, so the value is the level's.
        return (level_OGS * scale_OG[..., None] + (inside_OGS - inside_OGS.detach())).view_as(w_OI)

    @torch.no_grad()
    def codes(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        scale_OG, _ = self.scale_and_levels(params, scheme)
        return _codes(to_groups(w_OI.float(), scheme), scale_OG).view_as(w_OI)

    def beside(self, scheme: QuantScheme) -> dict[str, torch.dtype]:
        return {RATIO: scheme.scale_torch_dtype}

    def store_levels(self, q: QTensor) -> dict[str, Tensor]:
        assert isinstance(q.levels, Table)
        return {RATIO: (q.levels.values[..., 3] - 1).to(q.scheme.scale_torch_dtype)}

    def load_levels(self, beside: dict[str, Tensor], scale_OG: Tensor, scheme: QuantScheme) -> Levels:
        return Table(_levels(beside[RATIO].float()))

    def search(self, w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor) -> Params:
        seq = GRIDS.get("seq").search(w_OI, _seq(scheme), importance_I)
        best = _from_seq(seq, scheme)
        best_error_OG = self._error(w_OI, best, scheme, importance_I)
        for start in (best, greedy(w_OI, scheme)):
            params = start
            for round_ in range(_ROUNDS + 1):
                params = self._refit(w_OI, params, scheme, importance_I) if round_ else params
                error_OG = self._error(w_OI, params, scheme, importance_I)
                better_OG = error_OG < best_error_OG
                best = {k: torch.where(better_OG, params[k], v) for k, v in best.items()}
                best_error_OG = torch.where(better_OG, error_OG, best_error_OG)
        return best

    def _refit(self, w_OI: Tensor, params: Params, scheme: QuantScheme, importance_I: Tensor) -> Params:
        """α1 and α2 of least squares for the codes of `params`."""
        codes_OGS = to_groups(self.codes(w_OI, params, scheme), scheme)
        w_OGS, i_OGS = (to_groups(t, scheme) for t in (w_OI, importance_I.expand_as(w_OI)))
        first_OGS, second_OGS = (codes_OGS >> 1).float() * 2 - 1, (codes_OGS & 1).float() * 2 - 1
        total_OG, mixed_OG = i_OGS.sum(-1), (i_OGS * first_OGS * second_OGS).sum(-1)
        b1_OG, b2_OG = ((i_OGS * w_OGS * signs).sum(-1) for signs in (first_OGS, second_OGS))
        determinant_OG = total_OG.square() - mixed_OG.square()
        a1_OG = (total_OG * b1_OG - mixed_OG * b2_OG) / determinant_OG
        a2_OG = (total_OG * b2_OG - mixed_OG * b1_OG) / determinant_OG
        found = _params(torch.maximum(a1_OG, a2_OG), torch.minimum(a1_OG, a2_OG))
        solvable_OG = (determinant_OG > 0) & (a1_OG > 0) & (a2_OG > 0)
        return {k: torch.where(solvable_OG, v, params[k]) for k, v in found.items()}


def greedy(w_OI: Tensor, scheme: QuantScheme) -> Params:
    """As published: each α is the best for the signs of what is left."""
    w_OGS = to_groups(w_OI.detach().float(), scheme)
    a1_OG = w_OGS.abs().mean(-1)
    left_OGS = w_OGS - torch.where(w_OGS < 0, -a1_OG[..., None], a1_OG[..., None])
    return _params(a1_OG, left_OGS.abs().mean(-1))


def _params(a1_OG: Tensor, a2_OG: Tensor) -> Params:
    a1_OG = a1_OG.clamp_min(SMALLEST_SCALE)
    return {"log_scale": a1_OG.log(), RATIO: (a2_OG / a1_OG).clamp(_LEAST, _MOST)}


def _from_seq(seq: Params, scheme: QuantScheme) -> Params:
    scale_OG, _ = GRIDS.get("seq").scale_and_zero(seq, _seq(scheme))
    return {"log_scale": scale_OG.log(), RATIO: torch.full_like(scale_OG, 0.5)}


def _seq(scheme: QuantScheme) -> QuantScheme:
    return replace(scheme, grid="seq")


def _levels(ratio_OG: Tensor) -> Tensor:
    """-1 - r, -1 + r, 1 - r, 1 + r."""
    return torch.stack([-1 - ratio_OG, -1 + ratio_OG, 1 - ratio_OG, 1 + ratio_OG], dim=-1)


def _codes(w_OGS: Tensor, scale_OG: Tensor) -> Tensor:
    """Signs of the weight and of what α1 leaves of it, that of zero +, as two bits."""
    first_OGS = (w_OGS >= 0).to(torch.uint8)
    edge_OG1 = scale_OG[..., None]
    second_OGS = torch.where(first_OGS.bool(), w_OGS >= edge_OG1, w_OGS >= -edge_OG1)
    return first_OGS * 2 + second_OGS.to(torch.uint8)


GRIDS.register("r2q")(R2q())

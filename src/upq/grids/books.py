"""AQLM's levels (arXiv 2401.06118): eight weights are a scale of their row times a sum of one row of each code book.

`bits` books of 256 rows, so that a packed row is one byte for each book and eight weights. At two bits this is the
format 2×8 of the paper. The books belong to one matrix and are stored in float16 with it: `bits` · 4 KiB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.levels import Books, Levels
from upq.core.scheme import PER_CHANNEL, QTensor, QuantScheme
from upq.grids._base import GRIDS, SMALLEST_SCALE, Grid, Params, stored_scale
from upq.grids._vectors import better_rows, greedy_rows, residual_books

VECTOR, ROWS = 8, 256  # weights that a row of a book stands for, and rows of a book
BOOKS = "books"
_ITERATIONS = 100  # of k-means, for each book: AQLM's
_SAMPLE = 1 << 16  # vectors that k-means looks at
_SWEEPS, _BEAM = 4, 4  # of the search for the rows nearest to a weight


class CodeBooks(Grid):
    """Parameters `log_scale` (O, 1) and `books` (M, 256, 8). The scale starts as the row's RMS, so entries are near 1.

    Rows are looked for, not computed: `codes` ends where no single book has a better row. The gradient passes straight
    through to the weight, and to the rows that were chosen.
    """

    widths = (2, 3, 4)
    group_sizes = (PER_CHANNEL,)
    uniform = False
    vectors = True

    def check_columns(self, columns: int, scheme: QuantScheme) -> None:
        if columns % VECTOR:
            raise UPQError(f"in_features {columns} is not a multiple of {VECTOR}, which a row of grid books stands for")

    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        w_OI = w_OI.detach().float()
        self.check_columns(w_OI.shape[1], scheme)
        log_scale_O1 = w_OI.square().mean(-1, keepdim=True).sqrt().clamp_min(SMALLEST_SCALE).log()
        scale_O1 = stored_scale(log_scale_O1.exp(), scheme)
        vectors_NV = (w_OI / scale_O1).view(-1, VECTOR)
        generator = torch.Generator().manual_seed(0)
        if len(vectors_NV) > _SAMPLE:
            order_N = torch.randperm(len(vectors_NV), generator=generator)[:_SAMPLE]
            vectors_NV = vectors_NV[order_N.to(vectors_NV.device)]
        return {"log_scale": log_scale_O1, BOOKS: residual_books(vectors_NV, scheme.bits, ROWS, _ITERATIONS, generator)}

    def scale_and_levels(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Books]:
        scale_O1 = stored_scale(params["log_scale"].exp(), scheme)
        exact_MKV = params[BOOKS].clamp(-_LARGEST, _LARGEST)
        return scale_O1, Books(exact_MKV + (exact_MKV.half().float() - exact_MKV).detach())

    def fake(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        scale_O1, levels = self.scale_and_levels(params, scheme)
        codes_OGS = self.codes(w_OI, params, scheme)[:, None]
        straight_OI = w_OI.float() - w_OI.float().detach()  # exactly 0, so the value is the level's
        return levels.of(codes_OGS)[:, 0] * scale_O1 + straight_OI

    @torch.no_grad()
    def codes(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        scale_O1, levels = self.scale_and_levels(params, scheme)
        x_NV = (w_OI.float() / scale_O1).reshape(-1, VECTOR)
        rows_NM = greedy_rows(x_NV, levels.values)
        for _ in range(_SWEEPS):
            before_NM, rows_NM = rows_NM, better_rows(levels.values, rows_NM, x_NV, beam=_BEAM)
            if torch.equal(rows_NM, before_NM):
                break
        return levels.codes_of(rows_NM.view(len(w_OI), -1, len(levels.values)))

    def of_matrix(self, scheme: QuantScheme) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {BOOKS: ((scheme.bits, ROWS, VECTOR), torch.float16)}

    def beside(self, scheme: QuantScheme) -> dict[str, torch.dtype]:
        return {}

    def store_levels(self, q: QTensor) -> dict[str, Tensor]:
        assert isinstance(q.levels, Books)
        return {BOOKS: q.levels.values.half()}

    def load_levels(self, beside: dict[str, Tensor], scale_OG: Tensor, scheme: QuantScheme) -> Levels:
        return Books(beside[BOOKS].float())


_LARGEST = torch.finfo(torch.float16).max
GRIDS.register("books")(CodeBooks())

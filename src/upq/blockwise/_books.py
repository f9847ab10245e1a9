"""Codes and books of one weight against `tr((Ŵ-W) H (Ŵ-W)ᵀ)` (AQLM, arXiv 2401.06118, section 3).

AQLM takes 100 steps of Adam on books and scales between two searches. For fixed codes both are least squares, so here
they are solved: the books by conjugate gradients, each row's scale in closed form.

Shape suffixes: O = out features, I = in features, J = vectors in a row, V = weights of a vector, K = rows of a book,
M = books.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upq.core.levels import Books
from upq.core.scheme import QuantScheme
from upq.grids import GRIDS, Params
from upq.grids._vectors import better_rows, greedy_rows
from upq.grids.books import BOOKS, VECTOR

_AT_ONCE = 16  # vectors whose pull is computed in one product


@dataclass(frozen=True)
class Sums:
    """`Ŵ = scale · Σ rows of the books`."""

    books_MKV: Tensor
    rows_OJM: Tensor  # int64
    scale_O1: Tensor

    def weight(self) -> Tensor:
        return Books(self.books_MKV).sums(self.rows_OJM).flatten(1) * self.scale_O1

    def objective(self, w_OI: Tensor, h_II: Tensor) -> float:
        d_OI = self.weight() - w_OI
        return float(((d_OI @ h_II) * d_OI).sum(dtype=torch.float64))


@torch.no_grad()
def fit(
    w_OI: Tensor,
    h_II: Tensor,
    scheme: QuantScheme,
    *,
    beam: int,
    rounds: int,
    tolerance: float,
    steps: int,
    seed: int,
) -> tuple[Tensor, Params, list[float]]:
    """Codes (O, I), the grid's parameters, and the objective at the start and after each round.

    Residual k-means, then in turns books, scales and codes, until a round lowers the objective by less than the share
    `tolerance`. What is returned holds values as they are stored; the objective never rises but by that rounding.
    """
    grid, w_OI = GRIDS.get(scheme.grid), w_OI.float()
    params = grid.init(w_OI, scheme)
    scale_O1, levels = grid.scale_and_levels(params, scheme)
    assert isinstance(levels, Books)
    h_II = h_II / h_II.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)  # of dead inputs zeros
    rows_NM = greedy_rows((w_OI / scale_O1).view(-1, VECTOR), levels.values)
    now = Sums(levels.values, rows_NM.view(len(w_OI), -1, scheme.bits), scale_O1)
    generator = torch.Generator().manual_seed(seed)
    found = [now.objective(w_OI, h_II)]
    for _ in range(rounds):
        now = replace(now, books_MKV=solved_books(now, w_OI, h_II, steps))
        now = replace(now, scale_O1=solved_scales(now, w_OI, h_II))
        order_J = torch.randperm(w_OI.shape[1] // VECTOR, generator=generator)
        now = replace(now, rows_OJM=searched_rows(now, w_OI, h_II, order_J, beam=beam))
        found.append(now.objective(w_OI, h_II))
        if found[-1] > (1 - tolerance) * found[-2]:
            break
    # Books are float16 on disk, and scales too: rounded before the scales' last step, so that they make up for it.
    now = replace(now, books_MKV=now.books_MKV.half().float())
    log_scale_O1 = solved_scales(now, w_OI, h_II).log()
    codes_OI = Books(now.books_MKV).codes_of(now.rows_OJM)
    return codes_OI, {"log_scale": log_scale_O1, BOOKS: now.books_MKV}, found


def searched_rows(now: Sums, w_OI: Tensor, h_II: Tensor, order_J: Tensor, *, beam: int) -> Tensor:
    """Rows (O, J, M) by beam search, vector after vector in `order_J`, each with all others as they stand.

    Law (tests/test_aqlm.py): the objective never rises.
    """
    rows_OJM, scale_O1 = now.rows_OJM.clone(), now.scale_O1
    levels, inside_V = Books(now.books_MKV), torch.arange(VECTOR, device=w_OI.device)
    error_OI = now.weight() - w_OI
    for some_J in torch.split(order_J.to(w_OI.device), _AT_ONCE):
        columns_C = (some_J[:, None] * VECTOR + inside_V).flatten()
        near_CC = h_II[columns_C][:, columns_C]
        pull_OC = error_OI @ h_II[:, columns_C]  # half the gradient
        errors_OC = error_OI[:, columns_C]
        for place, j in enumerate(some_J.tolist()):
            here = slice(place * VECTOR, (place + 1) * VECTOR)
            metric_VV, error_OV = near_CC[here, here], errors_OC[:, here]
            kept_OV = levels.sums(rows_OJM[:, j : j + 1])[:, 0]
            rows_OJM[:, j] = better_rows(
                now.books_MKV,
                rows_OJM[:, j],
                kept_OV - error_OV / scale_O1,  # the weight, in units of the scale
                metric_VV=metric_VV,
                pull_NV=(pull_OC[:, here] - error_OV @ metric_VV) / scale_O1,
                beam=beam,
            )
            moved_OV = (levels.sums(rows_OJM[:, j : j + 1])[:, 0] - kept_OV) * scale_O1
            errors_OC[:, here] += moved_OV
            pull_OC += moved_OV @ near_CC[here]
        error_OI[:, columns_C] = errors_OC
    return rows_OJM


def solved_scales(now: Sums, w_OI: Tensor, h_II: Tensor) -> Tensor:
    """The scale (O, 1) of least squares for each row; the old one where that is not positive."""
    one_OI = replace(now, scale_O1=torch.ones_like(now.scale_O1)).weight()
    through_OI = one_OI @ h_II
    size_O1, along_O1 = (((through_OI * x).sum(-1, keepdim=True)) for x in (one_OI, w_OI))
    return torch.where((size_O1 > 0) & (along_O1 > 0), along_O1 / size_O1, now.scale_O1)


def solved_books(now: Sums, w_OI: Tensor, h_II: Tensor, steps: int) -> Tensor:
    """Books (M, K, V) after `steps` of conjugate gradients, preconditioned by the diagonal, from the present ones.

    Law (tests/test_aqlm.py): enough steps give the solution of the normal equations. A row that nobody uses stays.
    """
    books, k, v = now.books_MKV.shape
    places_N = (now.rows_OJM + torch.arange(books, device=w_OI.device) * k).flatten()

    def gathered(x_OI: Tensor) -> Tensor:
        """For each row of the books the sum over its vectors of what the weight's gradient is there."""
        each_NV = (x_OI * now.scale_O1).view(*now.rows_OJM.shape[:2], 1, v).expand(-1, -1, books, -1).reshape(-1, v)
        return torch.zeros(books * k, v, dtype=w_OI.dtype, device=w_OI.device).index_add_(0, places_N, each_NV)

    def weight(values: Tensor) -> Tensor:
        return replace(now, books_MKV=values.view(books, k, v)).weight()

    x = now.books_MKV.reshape(books * k, v).clone()
    ones_OI = now.scale_O1 * h_II.diagonal().expand(len(w_OI), -1)
    size = gathered(ones_OI)
    inverse = torch.where(size > 0, 1 / size, torch.zeros_like(size))
    left = gathered((w_OI - weight(x)) @ h_II)
    along = inverse * left
    product = (left * along).sum()
    # Below this all that is left is rounding, and it would grow in directions that change no weight.
    least = torch.finfo(w_OI.dtype).eps * product
    for _ in range(steps):
        moved_OI = weight(along)
        through_OI = moved_OI @ h_II
        curvature = (through_OI * moved_OI).sum()
        if not curvature > 0 or not product > least:
            break
        step = product / curvature
        x += step * along
        left -= step * gathered(through_OI)
        turned = inverse * left
        product, before = (left * turned).sum(), product
        along = turned + product / before * along
    return x.view_as(now.books_MKV)

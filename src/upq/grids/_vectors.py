"""Vectors as sums of rows of code books (AQLM, arXiv 2401.06118): k-means for the books, a beam search for the rows.

Shape suffixes: N = vectors, V = numbers of a vector, K = rows of a book, M = books, B = beam.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_AT_ONCE = 1 << 22  # distances of vectors to rows
_SETTLED = 200  # k-means ends when no more than one vector of so many changes its centre


def kmeans(x_NV: Tensor, rows: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Centres (K, V) of Lloyd's algorithm from vectors drawn at random, and the mean squared distance to them.

    Law (tests/test_aqlm.py): one more iteration never raises the distance. A centre without vectors stays.
    """
    order_N = torch.randperm(len(x_NV), generator=generator).to(x_NV.device)
    centres_KV = x_NV[order_N[torch.arange(rows, device=x_NV.device) % len(x_NV)]].clone()
    nearest_N = nearest(x_NV, centres_KV)
    for _ in range(iterations):
        counts_K = torch.bincount(nearest_N, minlength=rows)
        sums_KV = torch.zeros_like(centres_KV).index_add_(0, nearest_N, x_NV)
        centres_KV = torch.where(counts_K[:, None] > 0, sums_KV / counts_K.clamp_min(1)[:, None], centres_KV)
        before_N, nearest_N = nearest_N, nearest(x_NV, centres_KV)
        if int((nearest_N != before_N).sum()) <= len(x_NV) // _SETTLED:
            break
    return centres_KV, float((x_NV - centres_KV[nearest_N]).square().sum(-1).double().mean())


def nearest(x_NV: Tensor, centres_KV: Tensor) -> Tensor:
    """Of each vector the centre at the least distance (N,), int64."""
    halves_K = centres_KV.square().sum(-1) / 2
    return torch.cat([(halves_K - x_NV[part] @ centres_KV.T).argmin(-1) for part in _parts(x_NV, len(centres_KV))])


def residual_books(x_NV: Tensor, books: int, rows: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Books (M, K, V): k-means of the vectors, then of what each book leaves of them."""
    found, left_NV = list[Tensor](), x_NV
    for _ in range(books):
        centres_KV, _ = kmeans(left_NV, rows, iterations, generator)
        found.append(centres_KV)
        left_NV = left_NV - centres_KV[nearest(left_NV, centres_KV)]
    return torch.stack(found)


def greedy_rows(x_NV: Tensor, books_MKV: Tensor) -> Tensor:
    """Rows (N, M), int64: the nearest of the first book, then the nearest of the next to what is left, and so on."""
    found, left_NV = list[Tensor](), x_NV
    for book_KV in books_MKV:
        found.append(nearest(left_NV, book_KV))
        left_NV = left_NV - book_KV[found[-1]]
    return torch.stack(found, dim=-1)


def better_rows(
    books_MKV: Tensor,
    rows_NM: Tensor,
    target_NV: Tensor,
    *,
    metric_VV: Tensor | None = None,
    pull_NV: Tensor | None = None,
    beam: int = 1,
) -> Tensor:
    """Rows (N, M), int64, that lower `d·H·d + 2·d·p` of each vector, with d = Σ rows - target, H = metric, p = pull.

    Book after book, the `beam` best combinations of all its rows with what was kept before. The start is one of them.
    Without a metric the identity, without a pull zeros.
    Law (tests/test_aqlm.py): no vector's objective rises. With one book and a beam of 1 the result is the nearest row.
    """
    parts = _parts(target_NV, beam * books_MKV.shape[1])
    found = [
        _better(books_MKV, rows_NM[p], target_NV[p], metric_VV, None if pull_NV is None else pull_NV[p], beam)
        for p in parts
    ]
    return torch.cat(found)


def _better(
    books_MKV: Tensor,
    rows_NM: Tensor,
    target_NV: Tensor,
    metric_VV: Tensor | None,
    pull_NV: Tensor | None,
    beam: int,
) -> Tensor:
    def through(x: Tensor) -> Tensor:
        return x if metric_VV is None else x @ metric_VV

    def pulled(x_NBV: Tensor) -> Tensor:
        return x_NBV if pull_NV is None else x_NBV + pull_NV[:, None]

    def cost(d_NBV: Tensor) -> Tensor:
        return (d_NBV * pulled(pulled(through(d_NBV)))).sum(-1)

    n, (books, k, _) = len(rows_NM), books_MKV.shape
    start_NV = sum_of(books_MKV, rows_NM) - target_NV
    d_NBV, rows_NBM = start_NV[:, None], rows_NM[:, None]
    for m in range(books):
        book_KV = books_MKV[m]
        without_NBV = d_NBV - book_KV[rows_NBM[..., m]]
        # d = without + row: the cost of all rows but for what does not depend on the row.
        cost_NBK = pulled(through(without_NBV)) @ (2 * book_KV.T) + (book_KV * through(book_KV)).sum(-1)
        if beam == 1:
            chosen_NB, from_NB = cost_NBK.argmin(-1), None
        else:
            flat_NC = (cost_NBK + cost(without_NBV)[..., None]).flatten(1)
            best_NB = flat_NC.topk(min(beam, flat_NC.shape[1]), dim=-1, largest=False, sorted=False).indices
            from_NB, chosen_NB = best_NB // k, best_NB % k
        if from_NB is not None:
            without_NBV = without_NBV.gather(1, from_NB[..., None].expand(-1, -1, without_NBV.shape[-1]))
            rows_NBM = rows_NBM.gather(1, from_NB[..., None].expand(-1, -1, books))
        rows_NBM = torch.cat([rows_NBM[..., :m], chosen_NB[..., None], rows_NBM[..., m + 1 :]], dim=-1)
        d_NBV = without_NBV + book_KV[chosen_NB]
    cost_NB = cost(d_NBV)
    best_N = cost_NB.argmin(-1)
    each_N = torch.arange(n, device=best_N.device)
    falls_N = cost_NB[each_N, best_N] < cost(start_NV[:, None])[:, 0]
    return torch.where(falls_N[:, None], rows_NBM[each_N, best_N], rows_NM)


def sum_of(books_MKV: Tensor, rows_NM: Tensor) -> Tensor:
    """The vectors (N, V) that rows (N, M) stand for."""
    total_NV = books_MKV[0][rows_NM[:, 0]]
    for m in range(1, len(books_MKV)):
        total_NV = total_NV + books_MKV[m][rows_NM[:, m]]
    return total_NV


def _parts(x_NV: Tensor, rows: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // rows)
    return (slice(start, start + step) for start in range(0, max(1, len(x_NV)), step))

"""Orthogonal matrices: Hadamard's, of every width that Sylvester's and Paley's constructions reach, and random ones.

Shape suffixes: N = width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upq.core.errors import UPQError


def hadamard(width: int) -> Tensor:
    """(N, N) float64, orthogonal, every entry ±1/√N. Raises UPQError for a width that neither construction reaches.

    2ᵏ by Sylvester; m·2ᵏ with m = q + 1, q a prime of 3 modulo 4, or m = 2(q + 1), q a prime of 1 modulo 4, by Paley.
    """
    turn: Tensor = _doubled(_paley(width), width) / width**0.5
    return turn


def _paley(width: int) -> Tensor:
    """The smallest of Paley's that `width` is 2ᵏ times as large as.

    The largest leaves `factors` nothing to split: 8,191 is a prime, and a token of width 8,192 took 35 ms.
    """
    for size in (width >> k for k in reversed(range(width.bit_length())) if width % (1 << k) == 0):
        if (core := _core(size)) is not None:
            return core
    raise UPQError(f"no Hadamard matrix of width {width} is known here; use matrix=orthogonal")


def _doubled(found: Tensor, width: int) -> Tensor:
    """Sylvester's construction, from a matrix of ±1."""
    while len(found) < width:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


def signs(width: int, seed: int) -> Tensor:
    """(N, 1) of ±1."""
    return torch.randint(0, 2, (width, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomised(width: int, seed: int) -> Tensor:
    """A Hadamard matrix whose rows have random signs (QuIP#, 2402.04396)."""
    turn: Tensor = signs(width, seed) * hadamard(width)
    return turn


def factors(width: int) -> tuple[Tensor, Tensor]:
    """A and B with `hadamard(width) = A ⊗ B`: products with both in turn take N·(A + B) steps and not N²."""
    left, core = 1, len(_paley(width))
    while width % (2 * left * core) == 0 and (2 * left) ** 2 <= width:
        left *= 2
    return _doubled(torch.ones(1, 1, dtype=torch.float64), left) / left**0.5, hadamard(width // left)


def orthogonal(width: int, seed: int) -> Tensor:
    """(N, N) float64, uniform over the orthogonal matrices: the Q of a Gaussian matrix, its signs by R's diagonal."""
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    turn: Tensor = q * r.diagonal().sign()
    return turn


def _core(size: int) -> Tensor | None:
    """(size, size) of ±1 with orthogonal rows, where `size` is one or one of Paley's; else None."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _prime(size - 1) and (size - 1) % 4 == 3:
        skew = _bordered(size - 1, -1)
        return skew + torch.eye(size, dtype=torch.float64)
    half = size // 2
    if size % 2 == 0 and _prime(half - 1) and (half - 1) % 4 == 1:
        of_one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        of_zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(half - 1, 1), of_one) + torch.kron(torch.eye(half, dtype=torch.float64), of_zero)
    return None


def _bordered(q: int, sign: int) -> Tensor:
    """(q + 1, q + 1): Jacobsthal's matrix χ(i - j), with a row of ones above it and a column of `sign` beside it."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    found = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    found[1:, 1:] = character[(index[:, None] - index[None]) % q]
    found[0, 1:] = 1
    found[1:, 0] = sign
    return found


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))

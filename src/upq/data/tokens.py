"""Packed token rows: on disk as one safetensors file, in a program as a `TokenSet`.

Shape suffixes: N = rows, T = tokens in a row, B = rows in a batch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upq.core.scramble import scramble


@dataclass(frozen=True, slots=True)
class SourceUse:
    """What was read of one source; `identity` is a hash of local content, or the hub id."""

    path: str
    identity: str
    documents: int
    tokens: int
    rows: int = 0  # that were looked at, in the first reading
    bad_rows: int = 0  # of these, left out because they cannot be used


@dataclass(frozen=True)
class TokenSet:
    """Rows to train on and rows held out. A mask is True where a token counts as a target; None means everywhere.

    Rows are memory-mapped. The order of training is a function of the seed alone: no state has to be saved to resume.
    """

    tokens_NT: Tensor  # int32
    mask_NT: Tensor | None  # uint8
    validation_tokens_NT: Tensor  # int32; no rows when the text was too short to hold any out
    validation_mask_NT: Tensor | None  # uint8
    digest: str  # sha256 over the rows and masks
    sources: tuple[SourceUse, ...]
    seed: int

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Rows `step * size` and on of the endless sequence of epochs: (tokens int64, mask bool), each (B, T).

        Each epoch is a permutation of all rows of its own; a batch may begin in one epoch and end in the next.
        """
        rows = self.rows(step, size)
        tokens_BT = self.tokens_NT[rows].long()
        if self.mask_NT is None:
            return tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool)
        return tokens_BT, self.mask_NT[rows].bool()

    def rows(self, step: int, size: int) -> Tensor:
        """Numbers (B,) of the rows of a batch, int64."""
        n = len(self.tokens_NT)
        places = range(step * size, (step + 1) * size)
        return torch.tensor([int(permutation(n, self.seed, place // n)[place % n]) for place in places])

    def calibration(self, n: int) -> Tensor:
        """The first `n` training rows of the first epoch (int64), or all of them where there are fewer."""
        rows = permutation(len(self.tokens_NT), self.seed, 0)[:n]
        return self.tokens_NT[torch.from_numpy(rows.copy())].long()


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of `n` rows in an epoch."""
    per_epoch = int(scramble(np.array([epoch], np.uint64), seed)[0])
    order = np.argsort(scramble(np.arange(n, dtype=np.uint64), per_epoch), kind="stable")
    order.setflags(write=False)
    return order


def read(path: Path, key: str, seed: int) -> TokenSet | None:
    """The token set of `path`, memory-mapped, if it was made from `key`; None if not, or if it is no token set."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            names = set(file.keys())
            rows = [file.get_slice(name) for name in ("tokens", "validation_tokens")]
            if any(len(row.get_shape()) != 2 or row.get_dtype() != "I32" for row in rows):
                return None
            mask, validation_mask = (
                file.get_tensor(name) if name in names else None for name in ("mask", "validation_mask")
            )
            return TokenSet(
                tokens_NT=file.get_tensor("tokens"),
                mask_NT=mask,
                validation_tokens_NT=file.get_tensor("validation_tokens"),
                validation_mask_NT=validation_mask,
                digest=metadata["digest"],
                sources=tuple(SourceUse(**use) for use in json.loads(metadata["sources"])),
                seed=seed,
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        return None

"""Codes in 32-bit words, the first in the lowest bits: how Humming and GPTQ keep them. What is read is read by other
arithmetic than what is written, so that a mistake in either shows."""

from __future__ import annotations

import torch
from torch import Tensor

from upq import kernels

WORD = 32  # bits


def fills_words(columns: int, bits: int) -> bool:
    """Whether a row of codes ends with a word."""
    return columns * bits % WORD == 0


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """int32 (O, I·bits/32)."""
    return kernels.pack(codes_OI, bits).view(torch.int32)


def unpack(words_OW: Tensor, bits: int) -> Tensor:
    """int32 (O, I): bit n of a row is bit n % 32 of its word n // 32, and a code is `bits` of them."""
    positions = torch.arange(WORD, dtype=torch.int32)
    each_OIB = (words_OW[..., None] >> positions & 1).view(words_OW.shape[0], -1, bits)
    return (each_OIB << positions[:bits]).sum(-1, dtype=torch.int32)

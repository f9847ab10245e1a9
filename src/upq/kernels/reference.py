"""The canonical packed layout and products with it in plain torch, right on every device. Other kernels must equal it.

A row of codes is a little-endian bit stream: element k occupies bits [k·b, (k+1)·b) of its row, counted from the least
significant bit of byte 0. At 2 bits that is 4 codes a byte, at 4 bits 2, at 3 bits 8 codes in 3 bytes. The last byte
of a row is filled with zero bits.

Shape suffixes: O = out features, I = in features, G = groups in a row, B = bytes in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from upq.core.levels import Books, Table, Uniform

Zero = Tensor | float  # the zero point of evenly spaced levels: (O, G), or the one that all groups share
Standing = Zero | Table | Books  # what codes stand for: evenly spaced levels by their zero point


def row_bytes(in_features: int, bits: int) -> int:
    """B: bytes that a row of `in_features` codes takes."""
    return -(-in_features * bits // 8)


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes (O, I), uint8 below 2^bits, as bytes (O, B)."""
    o, i = codes_OI.shape
    if 8 % bits:  # codes cross bytes: pack their single bits instead
        planes = torch.arange(bits, dtype=torch.uint8, device=codes_OI.device)
        return pack((codes_OI[..., None] >> planes & 1).view(o, i * bits), 1)
    per_byte = 8 // bits
    fields = F.pad(codes_OI, (0, -i % per_byte)).view(o, -1, per_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes_OI.device)
    return (fields << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed_OB: Tensor, bits: int, in_features: int) -> Tensor:
    """The codes (O, I), uint8, that `pack` was given."""
    device = packed_OB.device
    if 8 % bits:
        # A code of at most 8 bits lies within two neighbouring bytes; the column after the last is never read into it.
        start_I = torch.arange(in_features, device=device) * bits
        bytes_OB = F.pad(packed_OB, (0, 1)).to(torch.int32)
        words_OI = bytes_OB[:, start_I // 8] | bytes_OB[:, start_I // 8 + 1] << 8
        shift_I = (start_I % 8).to(torch.int32)  # an int64 shift would widen the words
        return (words_OI >> shift_I & (1 << bits) - 1).to(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
    return (packed_OB[..., None] >> shifts & (1 << bits) - 1).flatten(1)[:, :in_features]


def dequantize(
    packed_OB: Tensor, scale_OG: Tensor, zero: Standing, *, bits: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The weight (O, I): exact in float32 (see QTensor.dequantize), then rounded once to `dtype`."""
    groups = scale_OG.shape[1]
    codes_OGS = unpack(packed_OB, bits, in_features).reshape(packed_OB.shape[0], groups, in_features // groups)
    levels = zero if isinstance(zero, Table | Books) else Uniform(zero)
    w_OGS = levels.of(codes_OGS).mul_(scale_OG.float()[..., None])
    return w_OGS.view(packed_OB.shape[0], in_features).to(dtype)


def rows_of(zero: Standing, rows: slice | Tensor) -> Standing:
    """What the codes of these rows stand for."""
    if isinstance(zero, Table | Books):
        return zero.rows(rows)
    return zero[rows] if isinstance(zero, Tensor) else zero


def linear(
    x: Tensor,
    packed_OB: Tensor,
    scale_OG: Tensor,
    zero: Standing,
    *,
    bits: int,
    in_features: int,
    bias_O: Tensor | None = None,
) -> Tensor:
    """`x · Ŵᵀ + b` for x (..., I), in the dtype of `x`."""
    w_OI = dequantize(packed_OB, scale_OG, zero, bits=bits, in_features=in_features, dtype=x.dtype)
    return F.linear(x, w_OI, bias_O)


def embedding(
    ids: Tensor,
    packed_VB: Tensor,
    scale_VG: Tensor,
    zero: Standing,
    *,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `ids` (...) of a packed table, as (..., I); only these rows are unpacked."""
    rows = ids.flatten()
    zero_rows = rows_of(zero, rows)
    w = dequantize(packed_VB[rows], scale_VG[rows], zero_rows, bits=bits, in_features=in_features, dtype=dtype)
    return w.view(*ids.shape, in_features)

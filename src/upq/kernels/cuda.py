"""Products with packed weights on a CUDA device, through gemlite's Triton kernels: codes stay packed.

Law (tests/cuda_laws.py): weights are exact up to one rounding to the type of x, as in the reference, since
`(code − zero) · scale` is computed in float32. With one scale a row the products are of `code − zero`, which is exact,
and the scale is applied to their sum. Sums are float32 and rounded once. gemlite times its tiles and takes the fastest;
tiles decide the order of sums. So, unlike on the CPU, last bits may differ with the number of tokens and the process.

What gemlite does not support is an error, with no fallback to the reference: widths other than 2, 4 and 8 bits, rows
that are no multiple of 32 columns, groups that are no power of two from 32 up, 2 GiB of codes and more in one weight,
x in another type than float16 and bfloat16.

Not run on a GPU yet: tests run the kernels in Triton's interpreter (tests/interpreted.py).

Shape suffixes: M = tokens, O = out features, I = in features, G = groups in a row, B = bytes in a row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.kernels.graph import without_gradient
from upq.kernels.reference import row_bytes

BITS = (2, 4, 8)

# How far gemlite may read past the end of scales and zeros: its widest choice is 16 tiles along a row at a time, none
# longer than a group and all together 8192 columns, and 1024 rows.
_TILES, _COLUMNS, _ROWS = 16, 8192, 1024
_ELEMENTS = 2**31  # it counts the elements of a matrix in 32 bits, with a sign


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A weight as gemlite takes it: bytes of 8/bits codes along the columns of W, row after row of W in memory."""

    codes_BO: Tensor
    scale_GO: Tensor  # float32
    zero: Tensor  # float32: (G, O), or (1,) where all groups have the same
    bits: int
    columns: int

    @property
    def group_size(self) -> int:
        """In columns, as gemlite's tiles need it: of a row without groups the next power of two, since they are one."""
        groups = len(self.scale_GO)
        return self.columns // groups if groups > 1 else 1 << (self.columns - 1).bit_length()

    @property
    def rows(self) -> int:
        return self.codes_BO.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes_BO, self.scale_GO, self.zero))


@cache
def library() -> Any:
    """gemlite. Its import queries the GPU."""
    logger = logging.getLogger("gemlite.core")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about the table of tiles that it found, which is expected
    try:
        import gemlite
    except Exception as error:  # Triton's errors on a machine without a compiler or a driver vary
        raise UPQError(
            f"the CUDA kernels are not there ({error}): pip install 'upq[cuda]' where a C compiler is, or choose the "
            "slow reference in torch, UPQ_KERNELS=reference"
        ) from error
    finally:
        logger.setLevel(level)
    return gemlite


@cache
def _product() -> Any:
    # Hidden from torch.compile: gemlite declares outputs in the type of x, and ours are float32 for few tokens.
    return torch.compiler.disable(library().forward_functional)  # type: ignore[no-untyped-call]


def pack(packed_OB: Tensor, scale_OG: Tensor, zero: Tensor | float, *, bits: int, in_features: int) -> Matrix:
    """A weight in the canonical layout (reference.py) as the products below take it.

    The codes are the same bytes, column by column; of a `packed_OB` that lies so already they are its own memory.
    """
    rows, groups = scale_OG.shape
    assert packed_OB.shape == (rows, row_bytes(in_features, bits))
    size = in_features // groups
    whole = in_features % 32 == 0 and (groups == 1 or (size >= 32 and size & (size - 1) == 0))
    if bits not in BITS or not whole:
        raise UPQError(
            "the CUDA kernels hold 2, 4 and 8 bits, rows of a multiple of 32 columns and groups of 32, 64, 128, …, "
            f"not {in_features} columns at {bits} bits in groups of {size}: UPQ_KERNELS=reference, or load with "
            "dequantize=True"
        )
    if packed_OB.numel() >= _ELEMENTS:
        raise UPQError(f"the CUDA kernels hold less than 2 GiB of codes, not {rows} rows: UPQ_KERNELS=reference")
    # Past the last column codes and x are masked with zeros, but scales and zeros are read: a NaN would spread.
    beyond = min(-groups % _TILES, -(-_COLUMNS // size))
    scale_GO = _with_room(scale_OG, beyond if groups > 1 else 0)  # the one scale of a row is not read tile by tile
    zero_GO = _with_room(zero, beyond) if isinstance(zero, Tensor) else scale_GO.new_tensor([zero])
    return Matrix(packed_OB.t().contiguous(), scale_GO, zero_GO, bits, in_features)


def _with_room(values_OG: Tensor, beyond: int) -> Tensor:
    """As (G, O) in float32, followed in memory by zeros for `beyond` more groups."""
    rows, groups = values_OG.shape
    room = values_OG.new_zeros((groups + beyond) * rows + _ROWS, dtype=torch.float32)
    return room[: groups * rows].view(groups, rows).copy_(values_OG.t())


def linears(x: Tensor, matrices: Sequence[Matrix], biases_O: Sequence[Tensor | None]) -> list[Tensor]:
    """`x · Ŵᵀ + b` for every matrix, for x (..., I), in the dtype of `x`."""

    def products() -> list[Tensor]:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            return [_linear(x, m, b) for m, b in zip(matrices, biases_O, strict=True)]

    return without_gradient(products, "CUDA", x, biases_O)


def _linear(x: Tensor, matrix: Matrix, bias_O: Tensor | None) -> Tensor:
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise UPQError(f"CUDA kernels take float16 and bfloat16, not {x.dtype}; cast, or UPQ_KERNELS=reference")
    *batch, columns = x.shape
    if matrix.columns != columns:
        raise UPQError(f"x has {columns} features, the packed weight {matrix.columns}")
    assert bias_O is None or bias_O.shape == (matrix.rows,)
    x_MI = x.reshape(-1, columns)
    if not len(x_MI):
        return x.new_empty((*batch, matrix.rows))
    portion = (_ELEMENTS - 1) // max(matrix.rows, columns)
    if len(x_MI) > portion:  # the logits of 17,000 tokens
        parts = torch.split(x_MI, portion)
        return torch.cat([_linear(part, matrix, bias_O) for part in parts]).view(*batch, matrix.rows)
    # Of few tokens gemlite adds up parts of a sum in the type of the output, at one token up to a hundred and more.
    in_parts = library().core.get_matmul_type(len(x_MI), matrix.bits) != "GEMM"
    settings = _settings(
        matrix.bits, matrix.group_size, len(matrix.scale_GO) == 1, x.dtype, torch.float32 if in_parts else x.dtype
    )
    y_MO: Tensor = _product()(x_MI, None, [matrix.codes_BO, matrix.scale_GO, matrix.zero], settings)
    if bias_O is not None:
        y_MO += bias_O
    return y_MO.to(x.dtype).view(*batch, matrix.rows)


@cache
def _settings(bits: int, group_size: int, one_scale: bool, x: torch.dtype, y: torch.dtype) -> list[int]:
    """gemlite's metadata of a layer. Its own `pack` makes the same, but from rounded scales and zeros."""
    types, own = library().core.TORCH_TO_DTYPE, torch.float32
    layer = library().GemLiteLinear(
        bits, group_size, input_dtype=types[x], output_dtype=types[y], acc_dtype=types[own], scaled_activations=False
    )
    layer.elements_per_sample = 8 // bits  # codes in a byte
    layer.meta_dtype = types[own]  # of scales
    layer.data_contiguous = True  # the rows of W side by side
    # 1, 1: products of code − zero, and the scale on their sum. 0, 3: products of (code − zero) · scale.
    layer.channel_scale_mode, layer.W_group_mode = (1, 1) if one_scale else (0, 3)
    found: list[int] = layer.get_meta_args()
    return found

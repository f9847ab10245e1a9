"""Products with packed weights on the CPU, compiled: `w2a8` multiplies integers, `w2a16` floats; codes stay packed.

w2a8    Each token is quantised to int8 on its way in, q = round(127·x / max|x|), and the sums of products are integers,
        exact. Only the rounding of the activations is an error: 4e-3 of a Gaussian token's products, relative.
w2a16   Activations in float32 and weights as they are; what is lost is the rounding of float32 sums.

Law (tests/test_kernels.py): an output depends on its token and its row alone, so batches, threads and the other
matrices of a call change no bit. In w2a8 every instruction set computes the same bits.

A token with NaN or infinity has NaN for every w2a8 product. The environment variable UPQ_CPU_ISA forces an instruction
set. cpu/layout.hpp describes the layout in memory.

Shape suffixes: O = out features, G = groups in a row, B = bytes in a row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.kernels.graph import without_gradient
from upq.kernels.reference import row_bytes

if TYPE_CHECKING:
    from upq.kernels import _cpu

Compute = Literal["w2a8", "w2a16"]


@cache
def extension() -> ModuleType:
    """The compiled module."""
    try:
        from upq.kernels import _cpu
    except ImportError as error:
        raise UPQError(
            f"the CPU kernels are not there ({error}): install upq again where a C++ compiler is, or choose the slow "
            "reference in torch, UPQ_KERNELS=reference"
        ) from error
    return _cpu


def instruction_sets() -> list[str]:
    """What this build has and this machine can run, the fastest first."""
    return list(extension().isas())


@cache
def instruction_set() -> str:
    """The one in use: UPQ_CPU_ISA, or the fastest."""
    known = instruction_sets()
    name = os.environ.get("UPQ_CPU_ISA") or known[0]
    if name not in known:
        raise UPQError(f"UPQ_CPU_ISA={name}: this build on this machine runs {', '.join(known)}; name one or unset it")
    return name


@cache
def isa(name: str) -> int:
    """Its number in the compiled module."""
    return instruction_sets().index(name)


@cache
def real(dtype: torch.dtype) -> Any:
    """The compiled module's name of a dtype."""
    reals = extension().Real
    known = {torch.float32: reals.f32, torch.float16: reals.f16, torch.bfloat16: reals.bf16}
    if dtype not in known:
        raise UPQError(f"CPU kernels take float32, float16 and bfloat16, not {dtype}; cast, or UPQ_KERNELS=reference")
    return known[dtype]


def pack(
    packed_OB: Tensor, scale_OG: Tensor, zero: Tensor | float, *, bits: int, in_features: int
) -> _cpu.PackedMatrix:
    """A weight in the canonical layout (reference.py) as the products below take it; a copy, rearranged."""
    rows, groups = scale_OG.shape
    if packed_OB.shape != (rows, row_bytes(in_features, bits)) or in_features % groups or not packed_OB.numel():
        raise UPQError(
            f"codes {tuple(packed_OB.shape)} and scales {tuple(scale_OG.shape)} are no weight of {in_features} columns "
            f"at {bits} bits"
        )
    scale_OG, zero_OG, constant = scales_and_zeros(scale_OG, zero)
    matrix: _cpu.PackedMatrix = extension().pack(
        packed_OB.contiguous(),
        scale_OG.contiguous().view(torch.uint8),
        None if zero_OG is None else zero_OG.contiguous().view(torch.uint8),
        constant,
        real(scale_OG.dtype),
        bits,
        in_features,
        torch.get_num_threads(),
    )
    return matrix


def scales_and_zeros(scale_OG: Tensor, zero: Tensor | float) -> tuple[Tensor, Tensor | None, float]:
    """Scales, zero points in their dtype where groups have their own, and the zero point of all where not."""
    if not isinstance(zero, Tensor):
        return scale_OG, None, zero
    if zero.dtype != scale_OG.dtype:
        scale_OG, zero = scale_OG.float(), zero.float()
    return scale_OG, zero, 0.0


def pack_books(packed_OB: Tensor, scale_O1: Tensor, books_MKV: Tensor) -> _cpu.PackedBooks:
    """A weight of code books (levels.Books) as `book_linear` takes it; a copy, rearranged."""
    books, rows, vector = books_MKV.shape
    if rows != 256 or vector != 8 or packed_OB.shape[1] % books or scale_O1.shape != (len(packed_OB), 1):
        raise UPQError(
            f"codes {tuple(packed_OB.shape)}, scales {tuple(scale_O1.shape)} and books {tuple(books_MKV.shape)} are no"
            " weight of code books"
        )
    matrix: _cpu.PackedBooks = extension().pack_books(
        packed_OB.contiguous(), books_MKV.float().contiguous(), scale_O1.float().flatten().contiguous()
    )
    return matrix


def book_linear(x: Tensor, matrix: _cpu.PackedBooks, bias_O: Tensor | None) -> Tensor:
    """`x · Ŵᵀ + b` for x (..., I), in the dtype of `x`: a table of dot products, and its entries added up.

    float32 throughout, so that only the rounding of sums is lost. Faster than decoding from the first token on, since
    a table serves all rows.
    """
    return without_gradient(lambda: [_book_linear(x, matrix, bias_O)], "CPU", x, [bias_O])[0]


def _book_linear(x: Tensor, matrix: _cpu.PackedBooks, bias_O: Tensor | None) -> Tensor:
    module, kind = extension(), real(x.dtype)
    *batch, columns = x.shape
    if matrix.columns != columns:
        raise UPQError(f"x has {columns} features, the packed weight {matrix.columns}")
    assert bias_O is None or bias_O.shape == (matrix.rows,)
    x, held = x.contiguous(), None if bias_O is None else bias_O.contiguous()
    out = x.new_empty((*batch, matrix.rows))
    module.multiply_books(
        x.data_ptr(),
        kind,
        x.numel() // columns,
        matrix,
        out.data_ptr(),
        0 if held is None else held.data_ptr(),
        kind if held is None else real(held.dtype),
        torch.get_num_threads(),
        isa(instruction_set()),
    )
    return out


def linears(
    x: Tensor, matrices: Sequence[_cpu.PackedMatrix], biases_O: Sequence[Tensor | None], *, compute: Compute = "w2a8"
) -> list[Tensor]:
    """`x · Ŵᵀ + b` for every matrix, for x (..., I), in the dtype of `x`; x is quantised once."""
    return without_gradient(lambda: _linears(x, matrices, biases_O, compute), "CPU", x, biases_O)


def _linears(
    x: Tensor, matrices: Sequence[_cpu.PackedMatrix], biases_O: Sequence[Tensor | None], compute: Compute
) -> list[Tensor]:
    module, kind = extension(), real(x.dtype)
    *batch, columns = x.shape
    for matrix, bias_O in zip(matrices, biases_O, strict=True):
        if matrix.columns != columns:
            raise UPQError(f"x has {columns} features, the packed weight {matrix.columns}")
        assert bias_O is None or bias_O.shape == (matrix.rows,)
    x = x.contiguous()
    held = [None if b is None else b.contiguous() for b in biases_O]  # until the products are done
    out = [x.new_empty((*batch, matrix.rows)) for matrix in matrices]
    module.multiply(
        x.data_ptr(),
        kind,
        x.numel() // columns,
        matrices,
        [y.data_ptr() for y in out],
        [0 if b is None else b.data_ptr() for b in held],
        [kind if b is None else real(b.dtype) for b in held],
        getattr(module.Compute, compute),
        torch.get_num_threads(),
        isa(instruction_set()),
    )
    return out

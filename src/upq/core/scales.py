"""The types that scales are stored in: floating point, or a byte that is one in eight bits or fewer.

float16, bfloat16, float32   as they are
e8m0    a byte: 2^(byte - 127). MXFP4's
e4m3    a byte: torch.float8_e4m3fn, times one float32 of the whole matrix. NVFP4's
e3m3    six bits of a byte, bias 3, times one float32 of the whole matrix. The upper two are free. RaZeR's
int8    a byte: 1 … 127, times one float16 of the row. DGQ's
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Below 2^-20 a float16 scale keeps fewer than five significant bits, and exporters halve it once more.
SMALLEST_SCALE = 2.0**-20

Outer = Literal["matrix", "row"]  # what shares a second factor


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleType:
    """Law (tests/test_scales.py): a value that was stored is stored as itself."""

    name: str
    dtype: torch.dtype  # of the stored tensor
    smallest: float = SMALLEST_SCALE
    largest: float
    outer: Outer | None = None

    @property
    def outer_dtype(self) -> torch.dtype:
        return torch.float16 if self.outer == "row" else torch.float32

    def encode(self, values: Tensor) -> Tensor:
        """The nearest that can be stored of positive float32 values."""
        values = values.clamp(self.smallest, self.largest)
        match self.name:
            case "e8m0":  # nearest in the exponent
                mantissa, exponent = torch.frexp(values)
                byte: Tensor = exponent - (mantissa < 0.5**0.5).int() + 127
                return byte.to(torch.uint8)
            case "e4m3":
                return values.to(torch.float8_e4m3fn).view(torch.uint8)
            case "e3m3":
                exponent = (torch.frexp(values)[1] - 1).clamp(-2, 4)
                eighths = (values / torch.ldexp(torch.ones_like(values), exponent - 3)).round().int()
                return ((exponent + 2 << 3) + eighths).to(torch.uint8)
            case "int8":
                return values.round().to(torch.uint8)
        return values.to(self.dtype)

    def decode(self, stored: Tensor) -> Tensor:
        """The values, float32."""
        match self.name:
            case "e8m0":
                return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - 127)
            case "e4m3":
                return stored.view(torch.float8_e4m3fn).float()
            case "e3m3":
                code = (stored & 63).int()
                exponent, mantissa = code >> 3, code & 7
                eighths = torch.where(exponent > 0, mantissa + 8, mantissa)
                return torch.ldexp(eighths.float(), exponent.clamp_min(1) - 6)
        return stored.float()


def _real(dtype: torch.dtype) -> ScaleType:
    return ScaleType(name=str(dtype).removeprefix("torch."), dtype=dtype, largest=torch.finfo(dtype).max)


_TYPES = (
    _real(torch.float16),
    _real(torch.bfloat16),
    _real(torch.float32),
    ScaleType(name="e8m0", dtype=torch.uint8, largest=2.0**127),
    ScaleType(name="e4m3", dtype=torch.uint8, smallest=2.0**-9, largest=448.0, outer="matrix"),
    ScaleType(name="e3m3", dtype=torch.uint8, smallest=2.0**-5, largest=28.0, outer="matrix"),
    ScaleType(name="int8", dtype=torch.uint8, smallest=1.0, largest=127.0, outer="row"),
)
SCALE_TYPES = {scale.name: scale for scale in _TYPES}
REAL_SCALES = ("float16", "bfloat16", "float32")

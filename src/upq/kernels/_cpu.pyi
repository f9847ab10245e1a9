"""The compiled kernels (cpu/module.cpp). Only upq.kernels.cpu imports them: they trust their arguments."""

from collections.abc import Sequence

from torch import Tensor

openmp: bool  # built with OpenMP; without it every product runs on one thread

class Real:
    f32: Real
    f16: Real
    bf16: Real

class Compute:
    w2a8: Compute
    w2a16: Compute

class PackedMatrix:
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

def isas() -> list[str]: ...
def pack(
    codes_OB: Tensor,
    scale_bytes: Tensor,
    zero_bytes: Tensor | None,
    zero: float,
    real: Real,
    bits: int,
    columns: int,
    threads: int,
    /,
) -> PackedMatrix: ...
def multiply(
    x: int,
    real: Real,
    tokens: int,
    matrices: Sequence[PackedMatrix],
    outputs: Sequence[int],
    biases: Sequence[int],
    bias_reals: Sequence[Real],
    compute: Compute,
    threads: int,
    isa: int,
    /,
) -> None: ...

"""The compiled kernels (cpu/module.cpp, cpu/decoder_module.cpp), through upq.kernels.cpu alone.

They trust their arguments. Integers stand for the addresses of tensors, which the caller keeps alive.
"""

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
def fake_seq(w: int, scale: int, groups: int, size: int, n: float, fake: int, threads: int, isa: int, /) -> None: ...
def seq_gradient(
    grad: int,
    w: int,
    scale: int,
    groups: int,
    size: int,
    n: float,
    bound: float,
    factor: float,
    d_w: int,
    d_delta: int,
    threads: int,
    isa: int,
    /,
) -> None: ...
def gjs(
    student: int,
    student_real: Real,
    teacher: int,
    teacher_real: Real,
    tokens: int,
    vocabulary: int,
    beta: float,
    value: int,
    grad: int,
    threads: int,
    isa: int,
    /,
) -> None: ...

class PackedBooks:
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

def pack_books(codes_OB: Tensor, books_MKV: Tensor, scale_O: Tensor, /) -> PackedBooks: ...
def multiply_books(
    x: int,
    real: Real,
    tokens: int,
    matrix: PackedBooks,
    output: int,
    bias: int,
    bias_real: Real,
    threads: int,
    isa: int,
    /,
) -> None: ...

class Dense:
    def __init__(self, rows: int, columns: int, data: int, real: Real, /) -> None: ...

class Canonical:
    def __init__(
        self,
        rows: int,
        columns: int,
        groups: int,
        bits: int,
        codes: int,
        scales: int,
        zeros: int,
        zero: float,
        real: Real,
        /,
    ) -> None: ...

class Linear:
    def __init__(self, weight: PackedMatrix | Dense, bias: int, /) -> None: ...

class Norm:
    def __init__(self, weight: int, eps: float, size: int, /) -> None: ...

class Mlp:
    def __init__(self, gate_up: Sequence[Linear], down: Linear, /) -> None: ...

class Experts:
    def __init__(self, router: Dense, experts: Sequence[Mlp], chosen: int, normalised: bool, /) -> None: ...

class Activation:
    silu: Activation
    gelu_tanh: Activation

class Block:
    def __init__(
        self,
        norms: Sequence[Norm],  # before and after attention, before and after the MLP, of queries, of keys
        qkv: Sequence[Linear],
        o: Linear,
        mlp: Mlp | Experts,
        activation: Activation,
        scaling: float,
        rope: int,
        window: int,
        residual: float,
        /,
    ) -> None: ...

class Rope:
    def __init__(self, frequencies: int, pairs: int, scaling: float, /) -> None: ...

class Dimensions:
    def __init__(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, embedding_scale: float, ropes: Sequence[Rope], /
    ) -> None: ...

class Stored:
    float32: Stored
    int8: Stored

class Decoder:
    def __init__(
        self,
        dimensions: Dimensions,
        embedding: Canonical | Dense,
        blocks: Sequence[Block],
        norm: Norm,
        head: Linear,
        stored: Stored,
        /,
    ) -> None: ...
    @property
    def cached_bytes(self) -> int: ...
    def open(self) -> int: ...
    def close(self, text: int, /) -> None: ...
    def length(self, text: int, /) -> int: ...
    def truncate(self, text: int, length: int, /) -> None: ...
    def forward(
        self,
        texts: Sequence[int],
        counts: Sequence[int],
        ids: int,
        compute: Compute,
        threads: int,
        isa: int,
        logits: int,
        /,
    ) -> None: ...

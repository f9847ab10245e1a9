"""A whole decoder of Llama's kind on the CPU, compiled: one call a token, without Python in between.

What lies between the products is float32, whatever the dtype of the tensors. Law (tests/test_decoding.py): logits
depend on the tokens alone, bit for bit; portions, threads and truncated positions make no difference.

Shape suffixes: O = out features, I = in features, H = hidden size, D = size of a head, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.kernels import cpu
from upq.kernels.weight import Weight

if TYPE_CHECKING:
    from upq.kernels import _cpu


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Weight | Tensor  # (O, I)
    bias_O: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """What a product reads."""
        return self.weight.matrix().nbytes if isinstance(self.weight, Weight) else self.weight.nbytes


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    before_attention: Norm
    before_mlp: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    of_queries: Norm | None = None  # over each head
    of_keys: Norm | None = None
    rotary: bool = True
    window: int | None = None  # positions that a query sees at most, its own among them

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a decoder."""

    embedding: Weight | Tensor  # (V, H)
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float  # of q·k
    frequencies: Tensor  # of the rotary positions, (D/2,)
    rotary_scaling: float = 1.0  # of their cosines and sines

    @property
    def weight_bytes(self) -> int:
        """Weights that one token reads."""
        return self.head.nbytes + sum(linear.nbytes for block in self.blocks for linear in block.linears)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one position."""
        return 2 * 4 * len(self.blocks) * self.kv_heads * self.head_dim


class Decoder:
    """`forward` appends tokens and gives the logits that follow the last one; `truncate` takes tokens back.

    One thread at a time: the key-value cache is its state.
    """

    def __init__(self, parts: Parts) -> None:
        _check(parts)
        self.parts = parts
        self._held: list[object] = []  # what the compiled decoder points to
        self._decoder = self._build()
        self._vocabulary = _shape(parts.embedding)[0]

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self._decoder.length

    def truncate(self, length: int) -> None:
        """Drop all positions from `length` on."""
        self._decoder.truncate(length)

    def forward(self, ids: Sequence[int], *, compute: cpu.Compute = "w2a8") -> Tensor:
        """Logits (V,), float32."""
        extension = cpu.extension()
        if not ids or min(ids) < 0 or max(ids) >= self._vocabulary:
            raise UPQError(f"token ids must be at least one, from 0 to {self._vocabulary - 1}")
        tokens = torch.tensor(ids, dtype=torch.int32)
        logits = torch.empty(_shape(self.parts.head.weight)[0])
        self._decoder.forward(
            tokens.data_ptr(),
            len(ids),
            getattr(extension.Compute, compute),
            torch.get_num_threads(),
            cpu.isa(cpu.instruction_set()),
            logits.data_ptr(),
        )
        return logits

    def _build(self) -> _cpu.Decoder:
        parts, extension = self.parts, cpu.extension()
        hidden = _shape(parts.embedding)[1]
        dimensions = extension.Dimensions(
            hidden,
            _shape(parts.blocks[0].gate.weight)[0],
            parts.heads,
            parts.kv_heads,
            parts.head_dim,
            parts.scaling,
            self._floats(parts.frequencies),
            parts.rotary_scaling,
        )
        blocks = [
            extension.Block(
                self._norm(block.before_attention),
                self._norm(block.before_mlp),
                self._norm(block.of_queries),
                self._norm(block.of_keys),
                [self._linear(linear) for linear in block.linears],
                block.rotary,
                block.window or 0,
            )
            for block in parts.blocks
        ]
        norm, head = self._norm(parts.norm), self._linear(parts.head)
        table = parts.embedding
        rows = self._canonical(table) if isinstance(table, Weight) else self._dense(table)
        decoder: _cpu.Decoder = extension.Decoder(dimensions, rows, blocks, norm, head)
        return decoder

    def _floats(self, tensor: Tensor | None) -> int:
        """Address of the values in float32, or 0."""
        if tensor is None:
            return 0
        values = tensor.detach().float().contiguous()
        self._held.append(values)
        return values.data_ptr()

    def _norm(self, norm: Norm | None) -> _cpu.Norm:
        address, eps = (0, 0.0) if norm is None else (self._floats(norm.weight), norm.eps)
        made: _cpu.Norm = cpu.extension().Norm(address, eps)
        return made

    def _linear(self, linear: Linear) -> _cpu.Linear:
        weight = linear.weight.matrix() if isinstance(linear.weight, Weight) else self._dense(linear.weight)
        self._held.append(weight)
        made: _cpu.Linear = cpu.extension().Linear(weight, self._floats(linear.bias_O))
        return made

    def _dense(self, weight_OI: Tensor) -> _cpu.Dense:
        held = weight_OI.detach().contiguous()
        self._held.append(held)
        dense: _cpu.Dense = cpu.extension().Dense(*held.shape, held.data_ptr(), cpu.real(held.dtype))
        return dense

    def _canonical(self, weight: Weight) -> _cpu.Canonical:
        scale_OG, zero, constant = cpu.scales_and_zeros(weight.scale_OG, weight.zero)
        packed_OB, scale_OG = weight.packed_OB.contiguous(), scale_OG.contiguous()
        zero = None if zero is None else zero.contiguous()
        self._held += [packed_OB, scale_OG, zero]
        table: _cpu.Canonical = cpu.extension().Canonical(
            *_shape(weight),
            scale_OG.shape[1],
            weight.bits,
            packed_OB.data_ptr(),
            scale_OG.data_ptr(),
            0 if zero is None else zero.data_ptr(),
            constant,
            cpu.real(scale_OG.dtype),
        )
        return table


def _shape(weight: Weight | Tensor) -> tuple[int, int]:
    rows, columns = (
        (weight.packed_OB.shape[0], weight.in_features) if isinstance(weight, Weight) else tuple(weight.shape)
    )
    return rows, columns


def _check(parts: Parts) -> None:
    """The compiled decoder trusts the shapes."""
    vocabulary, hidden = _shape(parts.embedding)
    heads, kv_heads, dim = parts.heads, parts.kv_heads, parts.head_dim
    mlp = _shape(parts.blocks[0].gate.weight)[0]
    queries, keys, up, down = (heads * dim, hidden), (kv_heads * dim, hidden), (mlp, hidden), (hidden, mlp)
    wanted = [queries, keys, keys, (hidden, heads * dim), up, up, down]
    linears = [(parts.head, (vocabulary, hidden))]
    norms: list[tuple[Norm | None, int]] = [(parts.norm, hidden)]
    for block in parts.blocks:
        linears += zip(block.linears, wanted, strict=True)
        norms += [(block.before_attention, hidden), (block.before_mlp, hidden)]
        norms += [(block.of_queries, dim), (block.of_keys, dim)]
    for linear, shape in linears:
        if _shape(linear.weight) != shape or (linear.bias_O is not None and linear.bias_O.shape != shape[:1]):
            raise UPQError(f"decoder: a weight is {_shape(linear.weight)}, expected {shape}")
    for norm, size in norms:
        if norm is not None and norm.weight.shape != (size,):
            raise UPQError(f"decoder: a norm has {tuple(norm.weight.shape)} weights, expected {size}")
    if heads % kv_heads or parts.frequencies.shape != (dim // 2,) or dim % 2:
        raise UPQError(f"decoder: {heads} heads of {dim} with {kv_heads} of keys and {len(parts.frequencies)} angles")

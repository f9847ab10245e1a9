"""A whole decoder on the CPU, compiled: one call a step for any number of texts, without Python in between.

`Parts` says what it computes: which norms a block has and where, one or several linears for what reads the same values,
factors, windows, tables of positions, an MLP or experts. There are no families here.

What lies between the products is float32, whatever the dtype of the tensors. Law (tests/test_decoding.py): logits
depend on the tokens alone, bit for bit; portions, threads and truncated positions make no difference.

Shape suffixes: O = out features, I = in features, H = hidden size, D = size of a head, V = vocabulary,
E = experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

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
    """RMS norm over as many values as it has weights."""

    weight: Tensor
    eps: float
    offset: float = 0.0  # added to the weights (Gemma)


@dataclass(frozen=True, slots=True)
class Mlp:
    """`down · (f(gate · x) * (up · x))`."""

    gate_up: tuple[Linear, ...]  # two, or one whose rows are the gate's and then those of up
    down: Linear

    @property
    def nbytes(self) -> int:
        """What a token reads."""
        return self.down.nbytes + sum(linear.nbytes for linear in self.gate_up)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The `chosen` MLPs with the largest shares of the router's softmax, added up by these shares.

    Law (tests/test_decoding.py): a token reads its own experts alone.
    """

    router_EH: Tensor
    gate_up: tuple[Weight | Tensor, ...]  # of each expert: rows of the gate, then of up
    down: tuple[Weight | Tensor, ...]
    chosen: int
    normalised: bool  # the shares of the chosen sum to one

    def mlps(self) -> tuple[Mlp, ...]:
        return tuple(Mlp((Linear(a),), Linear(b)) for a, b in zip(self.gate_up, self.down, strict=True))

    @property
    def nbytes(self) -> int:
        """What a token reads."""
        return self.router_EH.nbytes + self.chosen * self.mlps()[0].nbytes


Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """x += residual · after_attention(attention(before_attention(x))), and the same with the MLP."""

    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    of_queries: Norm | None = None  # over a head each, or over all heads
    of_keys: Norm | None = None
    qkv: tuple[Linear, ...]  # three, or one whose rows are those of q, then k, then v
    o: Linear
    mlp: Mlp | Experts
    activation: Activation = "silu"
    scaling: float  # of q·k
    rope: int | None = 0  # number of its table of positions
    window: int | None = None  # positions that a query sees at most, its own among them
    residual: float = 1.0

    @property
    def nbytes(self) -> int:
        """What a token reads."""
        return self.o.nbytes + self.mlp.nbytes + sum(linear.nbytes for linear in self.qkv)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions. The first 2·P values of a head turn, i with i + P; P may be less than half of it."""

    frequencies_P: Tensor
    scaling: float = 1.0  # of their cosines and sines


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a decoder."""

    embedding: Weight | Tensor  # (V, H)
    embedding_scale: float = 1.0
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear
    logits_divisor: float = 1.0
    heads: int
    kv_heads: int
    head_dim: int
    ropes: tuple[Rope, ...]

    @property
    def weight_bytes(self) -> int:
        """Weights that one token reads."""
        return self.head.nbytes + sum(block.nbytes for block in self.blocks)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one position, in float32."""
        return 2 * 4 * len(self.blocks) * self.kv_heads * self.head_dim


Stored = Literal["float32", "int8"]
STORED: tuple[Stored, ...] = get_args(Stored)


class Decoder:
    """`forward` appends tokens to texts and gives the logits that follow each; `truncate` takes tokens back.

    A text is a number that `open` gives and `close` takes. `cache`: how keys and values are stored; int8 takes a
    quarter of the memory, and a float32 scale for each position and head. The cache lies in blocks of 16 positions,
    so a text holds at most 15 that it does not use.

    One thread at a time: the key-value cache is its state.
    """

    def __init__(self, parts: Parts, *, cache: Stored = "float32") -> None:
        _check(parts)
        if cache not in STORED:
            raise UPQError(f"keys and values are stored as {' or '.join(STORED)}, not {cache!r}")
        self.parts = parts
        self.cache = cache
        self._held: list[object] = []  # what the compiled decoder points to
        self._decoder = self._build()
        self._vocabulary = _shape(parts.embedding)[0]

    def open(self) -> int:
        """A new text, without tokens."""
        return self._decoder.open()

    def close(self, text: int) -> None:
        """Its part of the cache is free for others."""
        self._decoder.close(text)

    def length(self, text: int) -> int:
        """Positions of a text in the cache."""
        return self._decoder.length(text)

    def truncate(self, text: int, length: int) -> None:
        """Drop all positions of a text from `length` on."""
        self._decoder.truncate(text, length)

    @property
    def cached_bytes(self) -> int:
        """Memory of the cache, in use or free."""
        return self._decoder.cached_bytes

    def forward(self, portions: Mapping[int, Sequence[int]], *, compute: cpu.Compute = "w2a8") -> Tensor:
        """Logits (B, V), float32: after each text, gone on with by its portion of tokens."""
        extension = cpu.extension()
        ids = [token for portion in portions.values() for token in portion]
        if not all(portions.values()) or not ids or min(ids) < 0 or max(ids) >= self._vocabulary:
            raise UPQError(f"token ids must be at least one, from 0 to {self._vocabulary - 1}")
        tokens = torch.tensor(ids, dtype=torch.int32)
        logits = torch.empty(len(portions), _shape(self.parts.head.weight)[0])
        self._decoder.forward(
            list(portions),
            [len(portion) for portion in portions.values()],
            tokens.data_ptr(),
            getattr(extension.Compute, compute),
            torch.get_num_threads(),
            cpu.isa(cpu.instruction_set()),
            logits.data_ptr(),
        )
        return logits if self.parts.logits_divisor == 1.0 else logits / self.parts.logits_divisor

    def _build(self) -> _cpu.Decoder:
        parts, extension = self.parts, cpu.extension()
        ropes = [
            extension.Rope(self._floats(rope.frequencies_P), len(rope.frequencies_P), rope.scaling)
            for rope in parts.ropes
        ]
        dimensions = extension.Dimensions(
            _shape(parts.embedding)[1], parts.heads, parts.kv_heads, parts.head_dim, parts.embedding_scale, ropes
        )
        blocks = [self._block(block) for block in parts.blocks]
        norm, head = self._norm(parts.norm), self._linear(parts.head)
        table = parts.embedding
        rows = self._canonical(table) if isinstance(table, Weight) else self._dense(table)
        decoder: _cpu.Decoder = extension.Decoder(
            dimensions, rows, blocks, norm, head, getattr(extension.Stored, self.cache)
        )
        return decoder

    def _block(self, block: Block) -> _cpu.Block:
        extension = cpu.extension()
        norms = [
            block.before_attention, block.after_attention, block.before_mlp, block.after_mlp,
            block.of_queries, block.of_keys,
        ]  # fmt: skip
        made: _cpu.Block = extension.Block(
            [self._norm(norm) for norm in norms],
            [self._linear(linear) for linear in block.qkv],
            self._linear(block.o),
            self._mlp(block.mlp) if isinstance(block.mlp, Mlp) else self._experts(block.mlp),
            getattr(extension.Activation, block.activation),
            block.scaling,
            -1 if block.rope is None else block.rope,
            block.window or 0,
            block.residual,
        )
        return made

    def _mlp(self, mlp: Mlp) -> _cpu.Mlp:
        made: _cpu.Mlp = cpu.extension().Mlp([self._linear(linear) for linear in mlp.gate_up], self._linear(mlp.down))
        return made

    def _experts(self, experts: Experts) -> _cpu.Experts:
        made: _cpu.Experts = cpu.extension().Experts(
            self._dense(experts.router_EH),
            [self._mlp(expert) for expert in experts.mlps()],
            experts.chosen,
            experts.normalised,
        )
        return made

    def _floats(self, tensor: Tensor | None, offset: float = 0.0) -> int:
        """Address of the values in float32, or 0."""
        if tensor is None:
            return 0
        values = tensor.detach().float().contiguous()
        values = values + offset if offset else values
        self._held.append(values)
        return values.data_ptr()

    def _norm(self, norm: Norm | None) -> _cpu.Norm:
        extension = cpu.extension()
        made: _cpu.Norm = (
            extension.Norm(0, 0.0, 0)
            if norm is None
            else extension.Norm(self._floats(norm.weight, norm.offset), norm.eps, len(norm.weight))
        )
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
        packed_OB, scale_OG, zero_OG, bits = weight.uniform()
        scale_OG, zero, constant = cpu.scales_and_zeros(scale_OG, zero_OG)
        packed_OB, scale_OG = packed_OB.contiguous(), scale_OG.contiguous()
        zero = None if zero is None else zero.contiguous()
        self._held += [packed_OB, scale_OG, zero]
        table: _cpu.Canonical = cpu.extension().Canonical(
            *_shape(weight),
            scale_OG.shape[1],
            bits,
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
    queries, keys = heads * dim, kv_heads * dim
    if heads % kv_heads or any(2 * len(rope.frequencies_P) > dim for rope in parts.ropes):
        angles = [len(rope.frequencies_P) for rope in parts.ropes]
        raise UPQError(f"decoder: {heads} heads of {dim} with {kv_heads} of keys and {angles} angles")
    _check_linears([parts.head], (vocabulary,), hidden)
    _check_norm(parts.norm, hidden)
    for block in parts.blocks:
        for norm in (block.before_attention, block.after_attention, block.before_mlp, block.after_mlp):
            _check_norm(norm, hidden)
        _check_norm(block.of_queries, dim, queries)
        _check_norm(block.of_keys, dim, keys)
        _check_linears(block.qkv, (queries, keys, keys), hidden)
        _check_linears([block.o], (hidden,), queries)
        mlps = (block.mlp,) if isinstance(block.mlp, Mlp) else block.mlp.mlps()
        width = _shape(mlps[0].down.weight)[1]
        for mlp in mlps:
            _check_linears(mlp.gate_up, (width, width), hidden)
            _check_linears([mlp.down], (hidden,), width)
        if isinstance(block.mlp, Experts):
            _check_linears([Linear(block.mlp.router_EH)], (len(mlps),), hidden)
            if not 0 < block.mlp.chosen <= len(mlps):
                raise UPQError(f"decoder: {block.mlp.chosen} experts chosen of {len(mlps)}")
        if block.rope is not None and not 0 <= block.rope < len(parts.ropes):
            raise UPQError(f"decoder: table of positions {block.rope} of {len(parts.ropes)}")


def _check_linears(linears: Sequence[Linear], rows: tuple[int, ...], columns: int) -> None:
    """One linear for each of `rows`, or one for all."""
    wanted = rows if len(linears) == len(rows) else (sum(rows),)
    for linear, outputs in zip(linears, wanted, strict=True):
        if _shape(linear.weight) != (outputs, columns):
            raise UPQError(f"decoder: a weight is {_shape(linear.weight)}, expected {(outputs, columns)}")
        if linear.bias_O is not None and linear.bias_O.shape != (outputs,):
            raise UPQError(f"decoder: a bias is {tuple(linear.bias_O.shape)}, expected {(outputs,)}")


def _check_norm(norm: Norm | None, *sizes: int) -> None:
    if norm is not None and norm.weight.shape not in [(size,) for size in sizes]:
        raise UPQError(f"decoder: a norm has {tuple(norm.weight.shape)} weights, expected {sizes}")

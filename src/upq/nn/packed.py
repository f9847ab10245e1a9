"""Layers that run from codes. Their state is the canonical file layout: packed bytes and scales, nothing else.

Law (tests/test_packed.py): through the reference kernels, the output equals that of the FakeQuantLinear the codes came
from, bit for bit. How near the others come is the law of upq.kernels.cpu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from upq import kernels
from upq.core.errors import UPQError
from upq.core.levels import Books, Levels, Table, Uniform
from upq.core.scales import REAL_SCALES
from upq.core.scheme import QTensor, QuantScheme
from upq.grids import GRIDS
from upq.kernels.reference import row_bytes
from upq.nn.activations import ActQuantiser, attach


class Packed(nn.Module):
    """Buffers `weight_packed` (O, B) uint8 and `weight_scale` (O, G).

    Where groups have levels of their own also what the grid keeps of them (O, G), `weight_zero` of uniform ones; where
    the type of the scales has a second factor also `weight_outer`, (1, 1) of a matrix or (O, 1) of rows; where levels
    are code books `weight_books` (M, 256, 8).

    This is the layout of an artefact on disk (tests/test_packed.py holds its golden bytes). A row of `weight_packed` is
    a little-endian bit stream of codes, B = ceil(I·bits/8), its last byte filled with zeros.

    Buffers and not parameters: nothing here is trained, and `model.dtype` is the dtype of the first float parameter.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_outer: Tensor | None

    def __init__(self, rows: int, columns: int, scheme: QuantScheme) -> None:
        super().__init__()
        self._weight: kernels.Weight | None = None
        self._stored: list[tuple[Tensor, int]] = []  # the buffers that it was made of, and their versions
        self.rows, self.columns = rows, columns
        self.scheme = scheme
        grid = GRIDS.get(scheme.grid)
        grid.check_columns(columns, scheme)
        self.shared, self.beside = grid.shared(scheme), (*grid.beside(scheme), *grid.of_matrix(scheme))
        scales, outer = (rows, scheme.groups(columns)), scheme.scale.outer
        self.register_buffer("weight_packed", torch.zeros(rows, row_bytes(columns, scheme.bits), dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(scales, dtype=scheme.scale_torch_dtype))
        for name, dtype in grid.beside(scheme).items():
            self.register_buffer(f"weight_{name}", torch.zeros(scales, dtype=dtype))
        for name, (of_matrix, dtype) in grid.of_matrix(scheme).items():
            self.register_buffer(f"weight_{name}", torch.zeros(of_matrix, dtype=dtype))
        if outer is not None:
            shape = (1 if outer == "matrix" else rows, 1)
            self.register_buffer("weight_outer", torch.ones(shape, dtype=scheme.scale.outer_dtype))
        # Levels evenly spaced, scales not encoded: the buffers are what kernels take.
        self._plain = grid.uniform and scheme.scale_dtype in REAL_SCALES
        self._constant = self.shared.zero if isinstance(self.shared, Uniform) else None

    def _fill(self, q: QTensor) -> Self:
        self.weight_packed = kernels.pack(q.codes_OI, q.scheme.bits)
        self.weight_scale = q.scale_OG
        for name, stored in GRIDS.get(q.scheme.grid).store_levels(q).items():
            setattr(self, f"weight_{name}", stored)
        if q.outer_O1 is not None:
            outer = q.outer_O1[:1] if q.scheme.scale.outer == "matrix" else q.outer_O1
            self.weight_outer = outer.to(q.scheme.scale.outer_dtype)
        if not _same(self.levels, q.levels) or not torch.equal(self._scales(), q.scales()):
            raise UPQError(f"cannot pack for grid {q.scheme.grid!r}: it stores other levels; use its freeze()")
        return self

    @property
    def levels(self) -> Levels:
        if self.shared is not None:
            return self.shared.to(self.weight_packed.device)
        beside = {name: self.get_buffer(f"weight_{name}") for name in self.beside}
        return GRIDS.get(self.scheme.grid).load_levels(beside, self.weight_scale, self.scheme)

    def _scales(self) -> Tensor:
        """The scales (O, G), decoded."""
        inner_OG = self.scheme.scale.decode(self.weight_scale)
        return inner_OG if self.scheme.scale.outer is None else inner_OG * self.get_buffer("weight_outer").float()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": None, "_stored": []}  # copies and pickles make the kernels' layout again

    def decoded(self) -> tuple[Tensor, kernels.Standing]:
        """Scales and levels as kernels take them. Where they were encoded, in bfloat16 if that holds all scales."""
        if self._plain:
            return self.weight_scale, self._zero()
        levels, scale_OG = self.levels, self._scales()
        short_OG = scale_OG.bfloat16()
        scale_OG = short_OG if torch.equal(short_OG.float(), scale_OG) else scale_OG
        return scale_OG, levels.zero if isinstance(levels, Uniform) else levels

    def _zero(self) -> Tensor | float:
        """Of levels that are evenly spaced, as stored."""
        zero = self._constant if self._constant is not None else self._buffers["weight_zero"]
        assert zero is not None
        return zero

    def kernel_weight(self) -> kernels.Weight:
        """What kernels multiply with: made when first asked for, and again when a buffer has changed."""
        # Straight from the dictionary: nn.Module's own look-up costs 0.3 µs a buffer, for every linear of every token.
        packed_OB, scale_OG = self._buffers["weight_packed"], self._buffers["weight_scale"]
        assert packed_OB is not None
        assert scale_OG is not None
        if self._plain:
            current = self._weight is not None and self._weight.is_of(packed_OB, scale_OG, self._zero())
        else:
            current = self._weight is not None and self._same_buffers()
        if self._weight is None or not current:
            scales_OG, zero = self.decoded()
            bits, columns = self.scheme.bits, self.columns
            self._weight = kernels.Weight(packed_OB, scales_OG, zero, bits=bits, in_features=columns)
            self._stored = [] if self._plain else self._versions()
        return self._weight

    def _versions(self) -> list[tuple[Tensor, int]]:
        named = ((name, tensor) for name, tensor in self._buffers.items() if tensor is not None)
        return [(t, 0 if t.is_inference() else t._version) for name, t in named if name.startswith("weight_")]

    def _same_buffers(self) -> bool:
        pairs = zip(self._stored, self._versions(), strict=True)
        return all(old is new and before == now for (old, before), (new, now) in pairs)

    def qtensor(self) -> QTensor:
        """The value this layer holds, as it was given."""
        codes_OI = kernels.unpack(self.weight_packed, self.scheme.bits, self.columns)
        outer_O1 = None
        if self.scheme.scale.outer is not None:
            outer_O1 = self.get_buffer("weight_outer").float().expand(self.rows, 1)
        return QTensor(codes_OI, self.weight_scale, self.levels, self.scheme, outer_O1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (O, I)."""
        scale_OG, zero = self.decoded()
        bits, columns = self.scheme.bits, self.columns
        return kernels.dequantize(self.weight_packed, scale_OG, zero, bits=bits, in_features=columns, dtype=dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}weight_packed"
        destination[name] = destination[name].contiguous()  # row by row, as in the file: see kernels.Weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(bfloat16)` casts every float buffer; scales would lose three bits for good.
        before = {name: b for name, b in self._buffers.items() if name.startswith("weight_") and b is not None}
        self._weight = None  # of the old place: its memory goes now and not with the next product
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if new.dtype != old.dtype:
                kept = torch.empty_like(old, device=new.device) if old.is_meta else old.to(new.device)
                self._buffers[name] = kept
        return self

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, {self.scheme}"


def _same(a: Levels, b: Levels) -> bool:
    if isinstance(a, Books) and isinstance(b, Books):
        return torch.equal(a.values, b.values)
    if isinstance(a, Table) and isinstance(b, Table):
        return torch.equal(a.values, b.values) and _equal(a.choice_OG, b.choice_OG)
    return isinstance(a, Uniform) and isinstance(b, Uniform) and _equal(a.zero, b.zero)


def _equal(a: Tensor | float | None, b: Tensor | float | None) -> bool:
    """Also of one number and as many of it."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Tensor):
        return isinstance(b, float) and torch.equal(a, torch.full_like(a, b))
    return _equal(b, a) if isinstance(b, Tensor) else a == b


class PackedLinear(Packed):
    """`y = x · Ŵᵀ + b` from codes; takes the place of nn.Linear."""

    def __init__(self, in_features: int, out_features: int, scheme: QuantScheme, *, bias: bool = False) -> None:
        super().__init__(out_features, in_features, scheme)
        self.in_features, self.out_features = in_features, out_features
        self.input: ActQuantiser | None = None  # how what it reads is rounded
        self.transposed = False  # it took the place of a Conv1D, whose weight is (I, O)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_qtensor(cls, q: QTensor, bias_O: Tensor | None = None) -> PackedLinear:
        with torch.device("meta"):
            layer = cls(q.codes_OI.shape[1], q.codes_OI.shape[0], q.scheme)
        layer.bias = None if bias_O is None else nn.Parameter(bias_O.detach())
        return layer._fill(q)

    @property
    def weight(self) -> Tensor:
        """The dense weight (O, I), made anew: some mixers ask a linear for the type or device of its weight."""
        return torch.empty(self.rows, self.columns, device="meta") if self.weight_packed.is_meta else self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernel_weight()
        if self.input is None or (self.input.scheme.of_kernel and kernels.rounds(weight, x)):
            return kernels.linear(x, weight, self.bias)
        return kernels.linear(self.input(x), weight, self.bias, rounded=True)


class Codes(Mapping[str, QTensor]):
    """Quantised linears by module path, kept packed: a code takes its bits and not a byte. Each look-up unpacks one."""

    def __init__(self, qtensors: Iterable[tuple[str, QTensor]]) -> None:
        self._packed = {path: PackedLinear.from_qtensor(q) for path, q in qtensors}

    def __getitem__(self, path: str) -> QTensor:
        return self._packed[path].qtensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


class PackedEmbedding(Packed):
    """Rows by id from a packed table, times the factor of the class it takes the place of; in the model's dtype."""

    like: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: QuantScheme) -> None:
        super().__init__(num_embeddings, embedding_dim, scheme)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.factor = Factor()
        # Empty, never saved; follows the dtype of the model through every cast.
        self.register_buffer("like", torch.empty(0), persistent=False)

    @classmethod
    def from_qtensor(cls, q: QTensor, dtype: torch.dtype = torch.float32) -> PackedEmbedding:
        with torch.device("meta"):
            layer = cls(q.codes_OI.shape[0], q.codes_OI.shape[1], q.scheme)
        layer.like = torch.empty(0, dtype=dtype, device=q.codes_OI.device)
        return layer._fill(q)

    def forward(self, ids: Tensor) -> Tensor:
        scale_OG, zero = self.decoded()
        rows = kernels.embedding(
            ids,
            self.weight_packed,
            scale_OG,
            zero,
            bits=self.scheme.bits,
            in_features=self.embedding_dim,
            dtype=self.like.dtype,
        )
        return self.factor.times(rows)


class ScaledEmbedding(nn.Embedding):
    """The dense counterpart of a PackedEmbedding with a factor."""

    factor: Factor

    def forward(self, ids: Tensor) -> Tensor:
        return self.factor.times(super().forward(ids))


@dataclass(frozen=True, slots=True)
class Factor:
    """What an embedding's class multiplies its rows with: Gemma's is rounded to the dtype of the model first."""

    value: float = 1.0
    rounded: bool = False

    @classmethod
    def of(cls, embedding: nn.Embedding) -> Factor:
        """Raises UPQError for a class that computes more than a look-up and a factor."""
        if type(embedding) is nn.Embedding:
            return cls()
        if isinstance(embedding, ScaledEmbedding):
            return embedding.factor
        if type(embedding).__name__.endswith("ScaledWordEmbedding"):
            rounded = hasattr(embedding, "scalar_embed_scale")
            value: Any = embedding.scalar_embed_scale if rounded else embedding.embed_scale
            return cls(float(value), rounded)
        raise UPQError(
            f"an embedding of the class {type(embedding).__name__} cannot be packed: it computes more than a look-up; "
            "leave it as it is: --set embeddings.bits=null"
        )

    def of_dtype(self, dtype: torch.dtype) -> float:
        """The value that rows of this dtype are multiplied with."""
        return torch.tensor(self.value, dtype=dtype).item() if self.rounded else self.value

    def times(self, rows: Tensor) -> Tensor:
        return rows if self.value == 1.0 else rows * self.of_dtype(rows.dtype)


class TiedHead(nn.Module):
    """The head of a model with tied embeddings: reads the embedding's tensors, owns none, so they are stored once."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: its tensors would appear a second time in the state.
        self._embedding: tuple[PackedEmbedding] = (embedding,)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    @property
    def embedding(self) -> PackedEmbedding:
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.embedding.kernel_weight())

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, tied to the embedding"


def pack_like(layer: nn.Module, scheme: QuantScheme, q: QTensor | None = None) -> PackedLinear | PackedEmbedding:
    """The packed counterpart of a linear or nn.Embedding: holding `q`, or empty and waiting for a file."""
    if isinstance(layer, nn.Embedding):
        factor = Factor.of(layer)
        if q is not None:
            table = PackedEmbedding.from_qtensor(q, layer.weight.dtype)
        else:
            table = PackedEmbedding(layer.num_embeddings, layer.embedding_dim, scheme)
        table.factor = factor
        return table
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor | None)
    transposed = isinstance(layer, Conv1D)
    columns, rows = weight.shape if transposed else reversed(weight.shape)
    if q is not None:
        packed = PackedLinear.from_qtensor(q, bias)
    else:
        packed = PackedLinear(columns, rows, scheme, bias=bias is not None)
    packed.transposed = transposed
    return packed


def dense_like(layer: Any, dtype: torch.dtype) -> nn.Linear | nn.Embedding | Conv1D:
    """The nn.Linear or nn.Embedding with the weight that a packed layer stands for."""
    dense: nn.Linear | nn.Embedding | Conv1D
    weight = layer.dequantize(dtype)
    if isinstance(layer, PackedEmbedding):
        scaled = layer.factor != Factor()
        dense = (ScaledEmbedding if scaled else nn.Embedding)(layer.num_embeddings, layer.embedding_dim, device="meta")
        if isinstance(dense, ScaledEmbedding):
            dense.factor = layer.factor
    elif layer.transposed:
        with torch.device("meta"):
            dense = Conv1D(layer.out_features, layer.in_features)  # type: ignore[no-untyped-call]
        weight = weight.t().contiguous()
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype))
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach().to(dtype))
    dense.weight = nn.Parameter(weight)
    if isinstance(layer, PackedLinear) and layer.input is not None:
        attach(dense, layer.input)
    return dense.train(layer.training)

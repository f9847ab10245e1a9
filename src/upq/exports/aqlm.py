"""AQLM in transformers' own format: code books that plain transformers runs with the package aqlm.

Codes, books and scales are the artefact's, bit for bit. Names, shapes and keys are those of aqlm.QuantizedLinear and
AqlmConfig (aqlm 1.1.7, transformers 5.24). On CPUs aqlm multiplies in float32 alone: load it with dtype=float32 there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from upq.core.errors import UPQError
from upq.core.levels import Books
from upq.core.precision import dtype_name
from upq.core.scheme import QuantScheme
from upq.exports._base import EXPORTS, Options, Placement, Plan
from upq.exports._directory import SafetensorsExporter, Stored
from upq.exports._source import Source, Weight
from upq.exports.dense import DTYPES, holds, place
from upq.files.tensors import TensorPlan
from upq.grids.books import ROWS, VECTOR


class AqlmOptions(Options):
    # The type to compute in, and of all that has no codes. auto: float16 where that holds everything, else float32.
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"


class Aqlm(SafetensorsExporter):
    """The linears of the blocks as codes, books and scales; all else dense."""

    Config = AqlmOptions
    packages = ("safetensors",)
    checked = "embedding_bag over codes and books times the scales, as aqlm dequantises, by UPQ itself"
    options: AqlmOptions

    def holds(self, scheme: QuantScheme) -> bool:
        return True  # of the linears `plan` asks for code books; an embedding becomes dense

    def plan(self, source: Source) -> Plan:
        linears = [weight for weight in source.weights.values() if source.packs(weight)]
        for weight in linears:
            assert weight.scheme is not None
            if weight.scheme.grid != "books":
                raise UPQError(
                    f"{source.path}: aqlm cannot hold grid {weight.scheme.grid} ({weight.name}), it has code books"
                    " alone; quantise with grid books and method aqlm"
                )
        books = {weight.scheme.bits for weight in linears if weight.scheme is not None}
        if len(books) != 1:
            found = " and ".join(map(str, sorted(books))) or "no"
            raise UPQError(f"{source.path}: aqlm cannot hold {found} books a weight, it has one number for all")
        dtype = self._dtype(source)
        placements = tuple(
            _place(weight, dtype) if source.packs(weight) else place(weight, dtype)
            for weight in source.weights.values()
        )
        notes = (f"it computes in {dtype_name(dtype)}; on CPUs aqlm needs float32: from_pretrained(…, dtype=float32)",)
        return Plan(placements=placements, notes=notes, dtype=dtype)

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        packed = [p.weight for p in plan.placements if p.packed]
        assert packed[0].scheme is not None
        dense = {path for path, module in source.model.named_modules() if isinstance(module, torch.nn.Linear)} | {
            source.layout.head
        }
        return {
            "dtype": plan.dtype_name,
            "quantization_config": {
                "quant_method": "aqlm",
                "in_group_size": VECTOR,
                "out_group_size": 1,
                "num_codebooks": packed[0].scheme.bits,
                "nbits_per_codebook": (ROWS - 1).bit_length(),
                "linear_weights_not_to_quantize": sorted(dense - {w.name.removesuffix(".weight") for w in packed}),
            },
        }

    def rows(self, p: Placement, stored: Stored, start: int, stop: int) -> Tensor:
        if not p.packed:
            return super().rows(p, stored, start, stop)
        codes, codebooks, scales = (tensor.name for tensor in p.tensors)
        rows_OJM = stored.rows(codes, start, stop).view(torch.uint8).long()
        books_MKV = stored.rows(codebooks).float()[:, :, 0]
        offsets_M = torch.arange(len(books_MKV)) * books_MKV.shape[1]
        vectors = F.embedding_bag((rows_OJM + offsets_M).flatten(0, 1), books_MKV.flatten(0, 1), mode="sum")
        scale_O1 = stored.rows(scales, start, stop).float().flatten(1)
        return vectors.view(len(rows_OJM), -1) * scale_O1

    def _dtype(self, source: Source) -> torch.dtype:
        if self.options.dtype != "auto":
            return DTYPES[self.options.dtype]
        if source.dtype == torch.float32:
            return torch.float32
        fits = all(
            _misfit(w, torch.float16) is None if source.packs(w) else holds(w, torch.float16)
            for w in source.weights.values()
        )
        return torch.float16 if fits else torch.float32


def _misfit(weight: Weight, dtype: torch.dtype) -> str | None:
    """Loaders give books and scales the type of the model, so it must hold them."""
    q = weight.qtensor()
    assert isinstance(q.levels, Books)
    for what, values in (("a code book", q.levels.values), ("a scale", q.scales())):
        if not torch.equal(values.to(dtype).float(), values):
            return f"{what} rounded to {dtype_name(dtype)}"
    return None


def _place(weight: Weight, dtype: torch.dtype) -> Placement:
    assert weight.scheme is not None
    tensors = _tensors(weight, dtype)
    return Placement(
        weight=weight,
        carrier=f"{weight.scheme.bits}x{(ROWS - 1).bit_length()}",
        bytes=sum(tensor.bytes for tensor in tensors),
        loss=_misfit(weight, dtype),
        tensors=tensors,
    )


def _tensors(weight: Weight, dtype: torch.dtype) -> tuple[TensorPlan, ...]:
    assert weight.scheme is not None
    rows, columns = weight.shape
    module, books = weight.name.removesuffix(".weight"), weight.scheme.bits

    def codes() -> Iterable[Tensor]:
        for start, stop in weight.chunks():
            q = weight.qtensor(start, stop)
            assert isinstance(q.levels, Books)
            yield q.levels.rows_of(q.codes_OI).view(torch.int8)  # two's complement, as aqlm has them

    def codebooks() -> Iterable[Tensor]:
        levels = weight.qtensor(0, 1).levels
        assert isinstance(levels, Books)
        return [levels.values[:, :, None].to(dtype)]

    def scales() -> Iterable[Tensor]:
        return [weight.qtensor().scales()[:, :, None, None].to(dtype)]

    return (
        TensorPlan(name=f"{module}.codes", dtype=torch.int8, shape=(rows, columns // VECTOR, books), parts=codes),
        TensorPlan(name=f"{module}.codebooks", dtype=dtype, shape=(books, ROWS, 1, VECTOR), parts=codebooks),
        TensorPlan(name=f"{module}.scales", dtype=dtype, shape=(rows, 1, 1, 1), parts=scales),
    )


EXPORTS.register("aqlm")(Aqlm)

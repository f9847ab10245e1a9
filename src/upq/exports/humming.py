"""Humming: the 2-bit products of vLLM and SGLang on CUDA GPUs, (q - z)·s with a float zero point z.

SEQ's zero point is 1.5, so its codes and scales are stored as they are. Names, shapes and keys are those of
HummingWeightSchema (humming-kernels 0.1.19), with which the tests compare what is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.levels import Uniform
from upq.core.precision import dtype_name
from upq.core.scheme import PER_CHANNEL, QTensor, QuantScheme
from upq.exports import _words as words
from upq.exports._base import EXPORTS, Options, Placement, Plan
from upq.exports._directory import SafetensorsExporter, Stored
from upq.exports._source import Source, Weight
from upq.exports.dense import DTYPES, dense_dtype, place
from upq.files.tensors import TensorPlan
from upq.grids import GRIDS

_SMALLEST_GROUP = 16
_RUN = 32  # codes that the kernels pack at a time


class HummingOptions(Options):
    # To compute in; Humming knows these two, and loads scales in it. auto: float16, which UPQ's scales have.
    dtype: Literal["auto", "fp16", "bf16"] = "auto"


class Humming(SafetensorsExporter):
    """The linears of the blocks as codes; all else as in the artefact, which engines round to `dtype` on loading."""

    Config = HummingOptions
    packages = ("safetensors",)
    checked = "(q - z)·s of the stored words, by UPQ itself: the engine needs a GPU and was not run"
    options: HummingOptions

    def plan(self, source: Source) -> Plan:
        schemes = {weight.scheme for weight in source.weights.values() if _packs(source, weight)}
        if len(schemes) != 1:
            found = "no linear has whole runs of 32 codes" if not schemes else "its linears have several schemes"
            raise UPQError(f"{source.path}: humming cannot hold it: {found}")
        dtype = torch.float16 if self.options.dtype == "auto" else DTYPES[self.options.dtype]
        placements = tuple(_place(source, weight, dtype) for weight in source.weights.values())
        notes = [f"it computes in {dtype_name(dtype)}, to which vLLM rounds on loading what is not packed"]
        if next(iter(schemes)).group_size == PER_CHANNEL:  # type: ignore[union-attr]
            notes.append("one scale a row: on one GPU only (tensor parallelism cannot cut its zero points)")
        return Plan(placements=placements, notes=(*notes, *source.vllm_notes()), dtype=dtype)

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        return {"dtype": plan.dtype_name, "quantization_config": _config(source)}

    def rows(self, p: Placement, stored: Stored, start: int, stop: int) -> Tensor:
        """What the kernel multiplies with, from the file alone but for the scheme."""
        scheme = p.weight.scheme
        if scheme is None or not p.packed:
            return super().rows(p, stored, start, stop)
        module = p.weight.name.removesuffix(".weight")
        codes_OI = words.unpack(stored.rows(p.weight.name, start, stop), scheme.bits).to(torch.uint8)
        scale_OG = stored.rows(f"{module}.weight_scale", start, stop)
        zero_OG = torch.full(scale_OG.shape, scheme.levels / 2)
        if f"{module}.zero_point" in stored:
            zero_OG = stored.rows(f"{module}.zero_point", start, stop).float()
        return QTensor(codes_OI, scale_OG, Uniform(zero_OG), scheme).dequantize()


def _packs(source: Source, weight: Weight) -> bool:
    scheme = weight.scheme
    if scheme is None or not source.packs(weight):
        return False
    return weight.shape[1] % _RUN == 0 and (scheme.group_size == PER_CHANNEL or scheme.group_size >= _SMALLEST_GROUP)


def _has_zeros(scheme: QuantScheme) -> bool:
    """Without zero points Humming takes 2^(b-1)."""
    return GRIDS.get(scheme.grid).zero(scheme) != scheme.levels / 2


def _place(source: Source, weight: Weight, dtype: torch.dtype) -> Placement:
    if not _packs(source, weight):
        return place(weight, dense_dtype(weight))
    scheme = weight.scheme
    assert scheme is not None
    pair = weight.scale_zero()
    held = all(torch.equal(x.to(dtype).float(), x.float()) for x in pair)
    tensors = _tensors(weight, dtype)
    return Placement(
        weight=weight,
        carrier=f"uint{scheme.bits}",
        bytes=sum(tensor.bytes for tensor in tensors),
        loss=None if held else f"a scale or a zero point rounded to {dtype_name(dtype)}",
        tensors=tensors,
    )


def _tensors(weight: Weight, dtype: torch.dtype) -> tuple[TensorPlan, ...]:
    scheme = weight.scheme
    assert scheme is not None
    rows, columns = weight.shape
    module, groups = weight.name.removesuffix(".weight"), (rows, scheme.groups(columns))

    def packed() -> Iterable[Tensor]:
        return (words.pack(weight.qtensor(start, stop).codes_OI, scheme.bits) for start, stop in weight.chunks())

    def of_groups(which: int) -> Iterable[Tensor]:
        return [weight.scale_zero()[which].to(dtype)]

    shape = (rows, columns * scheme.bits // words.WORD)
    found = [
        TensorPlan(name=weight.name, dtype=torch.int32, shape=shape, parts=packed),
        TensorPlan(name=f"{module}.weight_scale", dtype=dtype, shape=groups, parts=partial(of_groups, 0)),
    ]
    if _has_zeros(scheme):
        found.append(TensorPlan(name=f"{module}.zero_point", dtype=dtype, shape=groups, parts=partial(of_groups, 1)))
    return tuple(found)


def _config(source: Source) -> dict[str, Any]:
    weights = source.weights
    scheme = next(weight.scheme for weight in weights.values() if _packs(source, weight))
    assert scheme is not None
    dense = [name.removesuffix(".weight") for name in source.linears if not _packs(source, weights[name])]
    zeros = _has_zeros(scheme)
    return {
        "quant_method": "humming",
        "b_dtype": f"uint{scheme.bits}",
        "group_size": 0 if scheme.group_size == PER_CHANNEL else scheme.group_size,
        "has_zero_point": zeros,
        "is_fp_zero_point": zeros,
        "ignore": sorted([source.layout.head, *dense, *source.fused(dense)]),
    }


EXPORTS.register("humming")(Humming)

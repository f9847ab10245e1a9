"""MLX: Apple's framework and mlx-lm, on Macs (and on Linux CPUs, where this export is checked).

Its affine type is s·q + b with s and b of each group of 32, 64 or 128 weights: s = scale, b = -zero·scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from upq import kernels
from upq.core.errors import UPQError
from upq.core.precision import dtype_name
from upq.core.scheme import PER_CHANNEL
from upq.exports._base import EXPORTS, Options, Placement, Plan
from upq.exports._directory import SafetensorsExporter, Stored
from upq.exports._source import Source, Weight
from upq.exports.dense import DTYPES, dense_dtype, place
from upq.files.tensors import TensorPlan

_BITS = (2, 4, 8)
_GROUPS = (128, 64, 32)  # the larger, the fewer scales are written

# Linears that have biases in mlx-lm's classes, by family; in those of other families as the configuration says.
_BIASED = {"qwen2": ("q_proj", "k_proj", "v_proj"), "qwen3": ()}


class MlxOptions(Options):
    # Of s and b. float32 holds them always; float16 and bfloat16 only where scale and zero·scale have few bits.
    scales: Literal["fp32", "fp16", "bf16"] = "fp32"


class Mlx(SafetensorsExporter):
    """A scale of a whole row is written again for each of MLX's groups. Rows that no group size divides stay dense."""

    Config = MlxOptions
    packages = ("mlx",)
    install = "'mlx[cpu]' mlx-lm"
    checked = "mlx.core.dequantize on the CPU"
    options: MlxOptions

    def plan(self, source: Source) -> Plan:
        if lost := source.biases_beyond(_BIASED):
            raise UPQError(f"{source.path}: mlx-lm has no place for {lost[0]} in this family; export it as onnx")
        placements = tuple(self._place(weight) for weight in source.weights.values())
        if not any(_group(weight) for weight in source.weights.values()):
            raise UPQError(
                f"{source.path}: mlx cannot hold it packed: no weight has 2, 4 or 8 bits and rows of whole groups"
            )
        dense = [p.weight.name for p in placements if p.weight.scheme is not None and not _group(p.weight)]
        more = f" and {len(dense) - 1} more" if len(dense) > 1 else ""
        notes = (f"{dense[0]}{more}: float32, for MLX has no groups of its size",) if dense else ()
        return Plan(placements=placements, notes=notes, dtype=source.dtype)

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        quantization = _config(plan)
        return {"quantization": quantization, "quantization_config": quantization}

    def rows(self, p: Placement, stored: Stored, start: int, stop: int) -> Tensor:
        if not p.packed:
            return super().rows(p, stored, start, stop)
        import mlx.core as mx
        import numpy as np

        assert p.weight.scheme is not None
        words, *pair = (stored.rows(tensor.name, start, stop) for tensor in p.tensors)
        arrays = [mx.array(x.numpy()) for x in (words, *(x.float() for x in pair))]
        with mx.stream(mx.cpu):
            dense = mx.dequantize(*arrays, group_size=_group(p.weight), bits=p.weight.scheme.bits)
        return torch.from_numpy(np.array(dense))

    def _place(self, weight: Weight) -> Placement:
        group = _group(weight)
        if group is None:
            return place(weight, dense_dtype(weight))
        assert weight.scheme is not None
        dtype = DTYPES[self.options.scales]
        scale_OG, zero_OG = weight.scale_zero()
        pair = (scale_OG.float(), -zero_OG * scale_OG.float())
        held = all(torch.equal(x.to(dtype).float(), x) for x in pair)
        loss = None if held else f"scale or zero·scale rounded to {dtype_name(dtype)}"
        if weight.scheme.scale_dtype == "float32":
            loss = "s·q + b with float32 scales is rounded twice"
        tensors = _tensors(weight, group, dtype)
        size = sum(tensor.bytes for tensor in tensors)
        carrier = f"affine {weight.scheme.bits}"
        return Placement(weight=weight, carrier=carrier, bytes=size, loss=loss, tensors=tensors)


def _tensors(weight: Weight, group: int, dtype: torch.dtype) -> tuple[TensorPlan, ...]:
    assert weight.scheme is not None
    rows, columns = weight.shape
    module, bits = weight.name.removesuffix(".weight"), weight.scheme.bits

    def words() -> Iterable[Tensor]:
        for start, stop in weight.chunks():
            yield kernels.pack(weight.qtensor(start, stop).codes_OI, bits).view(torch.uint32)

    def pairs(of_zero: bool) -> Iterable[Tensor]:
        scale_OG, zero_OG = weight.scale_zero()
        value_OG = -zero_OG * scale_OG.float() if of_zero else scale_OG.float()
        return [value_OG.to(dtype).repeat_interleave(columns // group // scale_OG.shape[1], dim=1)]

    shape = (rows, columns // group)
    return (
        TensorPlan(name=weight.name, dtype=torch.uint32, shape=(rows, columns * bits // 32), parts=words),
        TensorPlan(name=f"{module}.scales", dtype=dtype, shape=shape, parts=partial(pairs, False)),
        TensorPlan(name=f"{module}.biases", dtype=dtype, shape=shape, parts=partial(pairs, True)),
    )


def _group(weight: Weight) -> int | None:
    """MLX's group size for the weight; None where it cannot be packed."""
    scheme = weight.scheme
    if scheme is None or scheme.bits not in _BITS:
        return None
    width = weight.shape[1] if scheme.group_size == PER_CHANNEL else scheme.group_size
    return next((group for group in _GROUPS if width % group == 0), None)


def _config(plan: Plan) -> dict[str, Any]:
    """What most weights have, and by name what others have; a weight without scales is known to be dense."""
    each = {
        p.weight.name.removesuffix(".weight"): {"group_size": group, "bits": p.weight.scheme.bits, "mode": "affine"}
        for p in plan.placements
        if p.weight.scheme is not None and (group := _group(p.weight)) is not None
    }
    common = max(each.values(), key=lambda found: sum(other == found for other in each.values()))
    return {**common, **{name: found for name, found in each.items() if found != common}}


EXPORTS.register("mlx")(Mlx)

"""Dense weights in a Hugging Face directory: for everything that knows no other format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from upq.core.progress import Progress
from upq.exports._base import EXPORTS, Exporter, Options, Placement, Plan, Rows, type_name
from upq.exports._directory import copy_companions, in_float32, stored_rows, write_config, write_shards
from upq.exports._source import Source, Weight
from upq.files.tensors import TensorPlan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class DenseOptions(Options):
    # auto: the type the model computes in. The packed layers round to it too, so nothing changes.
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"


class Dense(Exporter):
    """Every weight as a number of `dtype`.

    Exact are float32, where every weight is the artefact's own, and the model's own type, where it is the weight that
    the packed model multiplies with (nn/packed.py rounds the exact product once to the type of the activations).
    """

    Config = DenseOptions
    packages = ("safetensors",)
    checked = "rows of the safetensors files"
    options: DenseOptions

    def plan(self, source: Source) -> Plan:
        dtype = source.dtype if self.options.dtype == "auto" else DTYPES[self.options.dtype]
        own = dtype == source.dtype
        placements = tuple(place(weight, dtype, exact=own) for weight in source.weights.values())
        return Plan(placements=placements, dtype=dtype, compared_in=dtype if own else torch.float32)

    def write(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        out.mkdir()
        write_shards(out, [dense_tensor(p.weight, plan.dtype) for p in plan.placements], written=progress.advance)
        write_config(source, out, {"dtype": plan.dtype_name})
        copy_companions(source, out)

    def read(self, source: Source, plan: Plan, out: Path) -> Iterator[tuple[str, Rows]]:
        for name, rows in stored_rows(out):
            yield name, in_float32(rows)


def place(weight: Weight, dtype: torch.dtype, *, exact: bool = False) -> Placement:
    """A weight as numbers of `dtype`; `exact` where it is known to be."""
    lost = not exact and not holds(weight, dtype)
    loss = f"rounded to {type_name(dtype)}" if lost else None
    return Placement(weight=weight, carrier=type_name(dtype), bytes=weight.numel * dtype.itemsize, loss=loss)


def dense_dtype(weight: Weight) -> torch.dtype:
    """The type that holds a weight as it is: its own, or float32 for the product of codes and scales."""
    return weight.dtype if weight.scheme is None else torch.float32


def dense_tensor(weight: Weight, dtype: torch.dtype) -> TensorPlan:
    """A weight as a tensor of `dtype` under its own name."""

    def parts() -> Iterable[Tensor]:
        return (weight.dequantize(start, stop).to(dtype) for start, stop in weight.chunks())

    return TensorPlan(name=weight.name, dtype=dtype, shape=weight.shape, parts=parts)


def holds(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether every number of the weight is one of `dtype`."""
    if dtype == torch.float32 or (weight.scheme is None and weight.dtype == dtype):
        return True
    for start, stop in weight.chunks():
        exact = weight.dequantize(start, stop)
        if not torch.equal(exact.to(dtype).float(), exact):
            return False
    return True


EXPORTS.register("dense")(Dense)

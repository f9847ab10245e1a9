"""Dense weights in a Hugging Face directory: for everything that knows no other format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from upq.core.precision import dtype_name
from upq.core.scheme import QuantScheme
from upq.exports._base import EXPORTS, Options, Placement, Plan
from upq.exports._directory import SafetensorsExporter
from upq.exports._source import Form, Source, Weight
from upq.files.tensors import TensorPlan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class DenseOptions(Options):
    # auto: the type the model computes in. The packed layers round to it too, so nothing changes.
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"


class Dense(SafetensorsExporter):
    """Every weight as a number of `dtype`.

    Exact are float32, where every weight is the artefact's own, and the model's own type, where it is the weight that
    the packed model multiplies with (nn/packed.py rounds the exact product once to the type of the activations).
    """

    Config = DenseOptions
    packages = ("safetensors",)
    checked = "rows of the safetensors files"
    forms = frozenset(get_args(Form))
    options: DenseOptions

    def holds(self, scheme: QuantScheme) -> bool:
        return True

    def plan(self, source: Source) -> Plan:
        dtype = source.dtype if self.options.dtype == "auto" else DTYPES[self.options.dtype]
        own = dtype == source.dtype
        placements = tuple(place(weight, dtype, exact=own) for weight in source.weights.values())
        return Plan(placements=placements, dtype=dtype, compared_in=dtype if own else torch.float32)

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        return {"dtype": plan.dtype_name}


def place(weight: Weight, dtype: torch.dtype, *, exact: bool = False) -> Placement:
    """A weight as numbers of `dtype`; `exact` where it is known to be."""
    lost = not exact and not holds(weight, dtype)
    loss = f"rounded to {dtype_name(dtype)}" if lost else None
    tensor = _tensor(weight, dtype)
    return Placement(weight=weight, carrier=dtype_name(dtype), bytes=tensor.bytes, loss=loss, tensors=(tensor,))


def dense_dtype(weight: Weight) -> torch.dtype:
    """The type that holds a weight as it is: its own, or float32 for the product of codes and scales."""
    return weight.dtype if weight.scheme is None else torch.float32


def _tensor(weight: Weight, dtype: torch.dtype) -> TensorPlan:
    def parts() -> Iterable[Tensor]:
        if weight.inputs == -1:
            return (weight.dequantize(start, stop).to(dtype) for start, stop in weight.chunks())
        entries = weight.shape[0] if len(shape) == 2 else weight.shape[0] // shape[0]  # rows of one
        turned = range(0, weight.shape[0], entries)
        return (weight.dequantize(start, start + entries).to(dtype).T for start in turned)

    shape = weight.dense or weight.shape
    return TensorPlan(name=weight.name, dtype=dtype, shape=shape, parts=parts)


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

"""torchao: integers with a float zero point, as PARQ trains them; the road to ExecuTorch on phones.

Loads in plain transformers beside torchao. Stored are int8 numbers, one a byte: torchao packs them when it lowers a
model for a device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.scheme import PER_CHANNEL
from upq.exports._base import EXPORTS, Options, Placement, Plan
from upq.exports._directory import SafetensorsExporter, Stored
from upq.exports._source import Source, Weight
from upq.exports.dense import place
from upq.files.tensors import TensorPlan


class TorchAoOptions(Options):
    # int8: inputs of the linears are rounded to 8 bits a token, as kernels on phones want them; then logits differ.
    activations: Literal["float", "int8"] = "float"


class TorchAo(SafetensorsExporter):
    """`IntxUnpackedToInt8Tensor` for every quantised linear: (q - z)·s with q = code - 2^(b-1), z = zero - 2^(b-1),
    which is -½ for SEQ. Scales keep their own type; torchao rounds the product once to the type of the model."""

    Config = TorchAoOptions
    packages = ("torchao",)
    checked = "torchao's IntxUnpackedToInt8Tensor.dequantize in float32"
    options: TorchAoOptions

    def view(self, source: Source) -> Source:
        return source  # transformers is who loads it, and knows its own names

    def plan(self, source: Source) -> Plan:
        placements = tuple(self._place(source, weight) for weight in source.weights.values())
        bits = {p.weight.scheme.bits for p in placements if p.carrier != "dense" and p.weight.scheme is not None}
        if not any(source.packs(weight) for weight in source.weights.values()):
            raise UPQError(f"{source.path}: torchao cannot run it: no linear is quantised")
        notes = (f"one byte a weight on disk, {min(bits)} bits in ExecuTorch",) if bits else ()
        return Plan(placements=placements, notes=notes, dtype=source.dtype, compared_in=torch.float32)

    def metadata(self, source: Source, plan: Plan) -> dict[str, str]:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        metadata: dict[str, str] = {}
        for p in plan.placements:
            if p.packed:
                # what the library says of one row holds for all of them
                row = [next(iter(tensor.parts())) for tensor in _tensors(p.weight, 0, 1)]
                _, about = flatten_tensor_state_dict({p.weight.name: self._tensor(p.weight, *row, dtype=source.dtype)})
                metadata[p.weight.name] = about[p.weight.name]
            else:
                metadata[p.weight.name] = json.dumps({"_type": "Tensor"})
        return {**metadata, "tensor_names": json.dumps([p.weight.name for p in plan.placements])}

    def rows(self, p: Placement, stored: Stored, start: int, stop: int) -> Tensor:
        if not p.packed:
            return super().rows(p, stored, start, stop)
        parts = [stored.rows(tensor.name, start, stop) for tensor in p.tensors]
        dense: Tensor = self._tensor(p.weight, *parts, dtype=torch.float32).dequantize()
        return dense

    def _place(self, source: Source, weight: Weight) -> Placement:
        if not source.packs(weight):
            return place(weight, source.dtype)
        scheme = weight.scheme
        assert scheme is not None
        tensors = _tensors(weight)
        size = sum(tensor.bytes for tensor in tensors)
        return Placement(weight=weight, carrier=f"int{scheme.bits} in int8", bytes=size, tensors=tensors)

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        from torchao.prototype.parq.quant.config_torchao import StretchedIntxWeightConfig
        from torchao.quantization import PerAxis, PerGroup
        from transformers import TorchAoConfig

        scheme = next(w.scheme for w in source.weights.values() if source.packs(w))
        assert scheme is not None
        size, half = scheme.group_size, scheme.levels // 2
        intx = StretchedIntxWeightConfig(
            granularity=PerAxis(0) if size == PER_CHANNEL else PerGroup(size),
            b=scheme.bits,
            quant_min=-half,
            quant_max=half - 1,
            activation_quantization=self._activations,
        )
        dense = [name.removesuffix(".weight") for name in source.linears if not source.packs(source.weights[name])]
        config = TorchAoConfig(quant_type=intx, modules_to_not_convert=sorted([source.layout.head, *dense]))
        described: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
        return {"quantization_config": described}

    @property
    def _activations(self) -> str | None:
        return "int8_asym_per_token" if self.options.activations == "int8" else None

    def _tensor(self, weight: Weight, qdata: Tensor, scale: Tensor, zero: Tensor, *, dtype: torch.dtype) -> Any:
        from torchao.quantization.quantize_.workflows import IntxUnpackedToInt8Tensor

        assert weight.scheme is not None
        return IntxUnpackedToInt8Tensor(
            qdata=qdata,
            scale=scale,
            zero_point=zero,
            target_dtype=getattr(torch, f"int{weight.scheme.bits}"),
            block_size=(1, weight.shape[1] // scale.shape[1]),
            dtype=dtype,
            activation_quantization=self._activations,
        )


def _tensors(weight: Weight, first: int = 0, last: int | None = None) -> tuple[TensorPlan, ...]:
    """qdata, scale and zero point of rows [first, last) under the names that torchao gives them."""
    scheme = weight.scheme
    assert scheme is not None
    module, half = weight.name.removesuffix(".weight"), scheme.levels // 2
    groups = (weight.shape[0], scheme.groups(weight.shape[1]))

    def qdata() -> Iterable[Tensor]:
        ranges = weight.chunks() if last is None else [(first, last)]
        return (weight.qtensor(start, stop).codes_OI.to(torch.int8) - half for start, stop in ranges)

    return (
        TensorPlan(name=f"{module}._weight_qdata", dtype=torch.int8, shape=weight.shape, parts=qdata),
        TensorPlan(
            name=f"{module}._weight_scale",
            dtype=scheme.scale_torch_dtype,
            shape=groups,
            parts=lambda: [weight.scale_zero(first, last)[0]],
        ),
        TensorPlan(
            name=f"{module}._weight_zero_point",
            dtype=torch.float32,
            shape=groups,
            parts=lambda: [weight.scale_zero(first, last)[1] - half],
        ),
    )


EXPORTS.register("torchao")(TorchAo)

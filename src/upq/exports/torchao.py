"""torchao: integers with a float zero point, as PARQ trains them; the road to ExecuTorch on phones.

Loads in plain transformers beside torchao. Stored are int8 numbers, one a byte: torchao packs them when it lowers a
model for a device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.progress import Progress
from upq.core.scheme import PER_CHANNEL
from upq.exports._base import EXPORTS, Exporter, Options, Placement, Plan, Rows
from upq.exports._directory import (
    Stored,
    copy_companions,
    in_float32,
    stored_rows,
    write_config,
    write_shards,
)
from upq.exports._source import Source, Weight
from upq.exports.dense import dense_tensor, place
from upq.files.tensors import TensorPlan


class TorchAoOptions(Options):
    # int8: inputs of the linears are rounded to 8 bits a token, as kernels on phones want them; then logits differ.
    activations: Literal["float", "int8"] = "float"


class TorchAo(Exporter):
    """`IntxUnpackedToInt8Tensor` for every quantised linear: (q - z)·s with q = code - 2^(b-1), z = zero - 2^(b-1),
    which is -½ for SEQ. Scales keep their own type; torchao rounds the product once to the type of the model."""

    Config = TorchAoOptions
    packages = ("torchao",)
    checked = "torchao's IntxUnpackedToInt8Tensor.dequantize in float32"
    options: TorchAoOptions

    def plan(self, source: Source) -> Plan:
        placements = tuple(self._place(source, weight) for weight in source.weights.values())
        bits = {p.weight.scheme.bits for p in placements if p.carrier != "dense" and p.weight.scheme is not None}
        if not any(source.packs(weight) for weight in source.weights.values()):
            raise UPQError(f"{source.path}: torchao cannot run it: no linear is quantised")
        notes = (f"one byte a weight on disk, {min(bits)} bits in ExecuTorch",) if bits else ()
        return Plan(placements=placements, notes=notes, dtype=source.dtype, compared_in=torch.float32)

    def write(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        out.mkdir()
        tensors: list[TensorPlan] = []
        metadata: dict[str, str] = {}
        for p in plan.placements:
            if source.packs(p.weight):
                tensors += _tensors(p.weight)
                # what the library says of one row holds for all of them
                _, about = flatten_tensor_state_dict({p.weight.name: self._rebuilt(p.weight, 0, 1, source.dtype)})
                metadata[p.weight.name] = about[p.weight.name]
            else:
                tensors.append(dense_tensor(p.weight, plan.dtype))
                metadata[p.weight.name] = json.dumps({"_type": "Tensor"})
        metadata["tensor_names"] = json.dumps([p.weight.name for p in plan.placements])
        write_shards(out, tensors, written=lambda: None, metadata=metadata)
        write_config(source, out, {"quantization_config": self._config(source, plan)})
        copy_companions(source, out)
        progress.advance(len(plan.placements))

    def read(self, source: Source, plan: Plan, out: Path) -> Iterator[tuple[str, Rows]]:
        stored = dict(stored_rows(out))
        for p in plan.placements:
            if source.packs(p.weight):
                yield p.weight.name, partial(self._dequantized, stored, p.weight)
            else:
                yield p.weight.name, in_float32(stored[p.weight.name])

    def _place(self, source: Source, weight: Weight) -> Placement:
        if not source.packs(weight):
            return place(weight, source.dtype)
        scheme = weight.scheme
        assert scheme is not None
        rows, columns = weight.shape
        scales = rows * scheme.groups(columns) * (scheme.scale_torch_dtype.itemsize + 4)
        return Placement(weight=weight, carrier=f"int{scheme.bits} in int8", bytes=weight.numel + scales)

    def _config(self, source: Source, plan: Plan) -> dict[str, Any]:
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
        return described

    @property
    def _activations(self) -> str | None:
        return "int8_asym_per_token" if self.options.activations == "int8" else None

    def _rebuilt(self, weight: Weight, start: int, stop: int, dtype: torch.dtype) -> Any:
        """torchao's tensor of these rows, from the artefact."""
        qdata, scale, zero = (next(iter(t.parts())) for t in _tensors(weight, start, stop))
        return self._tensor(weight, qdata, scale, zero, dtype)

    def _tensor(self, weight: Weight, qdata: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Any:
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

    def _dequantized(self, stored: dict[str, Stored], weight: Weight, start: int, stop: int) -> Tensor:
        parts = [stored[t.name](start, stop) for t in _tensors(weight)]
        dense: Tensor = self._tensor(weight, parts[0], parts[1], parts[2], torch.float32).dequantize()
        return dense


def _tensors(weight: Weight, first: int = 0, last: int | None = None) -> list[TensorPlan]:
    """qdata, scale and zero point of rows [first, last) under the names that torchao gives them."""
    scheme = weight.scheme
    assert scheme is not None
    module, half = weight.name.removesuffix(".weight"), scheme.levels // 2
    groups = (weight.shape[0], scheme.groups(weight.shape[1]))

    def qdata() -> Iterable[Tensor]:
        ranges = weight.chunks() if last is None else [(first, last)]
        return (weight.qtensor(start, stop).codes_OI.to(torch.int8) - half for start, stop in ranges)

    return [
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
    ]


EXPORTS.register("torchao")(TorchAo)

"""compressed-tensors: integers and scales that plain transformers, vLLM and SGLang load without UPQ.

SEQ's four levels are the integers -3, -1, 1, 3 on half the scale: exact in any symmetric integer format of three bits
or more. Four bits is what every engine has fast kernels for; `int2` is exact in two. NVFP4 and MXFP4 keep their bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from upq import kernels
from upq.core.act_scheme import ActScheme
from upq.core.errors import UPQError
from upq.core.precision import dtype_name
from upq.core.scheme import PER_CHANNEL, QuantScheme
from upq.exports import _integers
from upq.exports._base import EXPORTS, Options, Placement, Plan
from upq.exports._checkpoint import expert_by_expert, foreign_to_transformers
from upq.exports._directory import SafetensorsExporter, Stored
from upq.exports._fp4 import Fp4, fp4, misfit, outer
from upq.exports._source import Source, Weight
from upq.exports.dense import DTYPES, holds, place
from upq.files.tensors import TensorPlan

_UNPACKED = "int-quantized"


class CompressedTensorsOptions(Options):
    # Of the integers. auto: the least of 2, 4 and 8 that hold the grid's levels.
    bits: Literal["auto", 2, 3, 4, 5, 6, 7, 8] = "auto"
    # The type to compute in: scales are loaded in it, so it must hold them. auto: float16 where that holds everything,
    # else float32.
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"


class CompressedTensors(SafetensorsExporter):
    """The linears of the blocks as integers (`pack-quantized`) or FP4 (`nvfp4-` or `mxfp4-`); all else dense.

    Where the artefact rounds the inputs of its linears to integers a token, integers are `int-quantized`, a byte each
    in four bits too: what engines multiply in integers from (W4A8, W8A8).

    Loaders give scales the type of the model, so float16 scales in a bfloat16 model would lose three bits. That is why
    the export of a bfloat16 model computes in float16, or in float32 where float16 does not hold everything.
    """

    Config = CompressedTensorsOptions
    packages = ("compressed-tensors",)
    forms = frozenset({"linear", "expert"})
    checked = "compressed-tensors' own decompressor, scales taken to float32"
    options: CompressedTensorsOptions

    def holds(self, scheme: QuantScheme) -> bool:
        return super().holds(scheme) or fp4(scheme) is not None

    def carries(self, activations: ActScheme) -> bool:
        return activations == ActScheme(bits=activations.bits)

    def view(self, source: Source) -> Source:
        return expert_by_expert(super().view(source))

    def plan(self, source: Source) -> Plan:
        dtype = self._dtype(source)
        placements = tuple(self._place(source, weight, dtype) for weight in source.weights.values())
        if not any(p.packed for p in placements):
            raise UPQError(f"{source.path}: compressed-tensors cannot run it: no linear is quantised")
        if len(formats := {_format(p, source) for p in placements if p.packed}) > 1:
            raise UPQError(f"{source.path}: compressed-tensors holds one of {' and '.join(sorted(formats))}, not both")
        note = f"it computes in {dtype_name(dtype)}"
        if dtype != source.dtype and dtype == torch.float32:
            note += ", for float16 does not hold everything (--set dtype=fp16 --allow-inexact would round it)"
        notes = [note]
        if _rounds(source):
            notes.append(
                "compressed-tensors' emulation has 2^bits - 1 steps from end to end of a token's range, UPQ one less"
            )
        if foreign_to_transformers(source):
            notes.append("transformers does not read its experts and would start from random ones: run it with vLLM")
        return Plan(placements=placements, notes=(*notes, *source.vllm_notes()), dtype=dtype)

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        return {"dtype": plan.dtype_name, "quantization_config": _config(source, plan)}

    def rows(self, p: Placement, stored: Stored, start: int, stop: int) -> Tensor:
        if not p.packed:
            return super().rows(p, stored, start, stop)
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        config, module = stored.config["quantization_config"], p.weight.name.removesuffix(".weight")
        groups = config["config_groups"].values()
        scheme = next(group for group in groups if not {"Linear", module}.isdisjoint(group["targets"]))
        codes, scale, *rest = (tensor.name for tensor in p.tensors)
        packed, scales = stored.rows(codes, start, stop), stored.rows(scale, start, stop)
        if config["format"] == _UNPACKED:
            state = {"weight": packed, "weight_scale": scales.float()}
        elif p.carrier.startswith("int"):
            state = {
                "weight_packed": packed,
                # In float32 the product is exact; it is rounded where the model computes, in whatever type that is.
                "weight_scale": scales.float(),
                "weight_shape": torch.tensor([len(packed), int(stored.rows(rest[0])[1])]),
            }
        else:
            state = {"weight_packed": packed, "weight_scale": scales}
            if rest:
                state["weight_global_scale"] = stored.rows(rest[0])
        compressor = BaseCompressor.get_value_from_registry(config["format"])
        dense: Tensor = compressor.decompress(state, QuantizationScheme.model_validate(scheme))["weight"]
        return dense.float()

    def _dtype(self, source: Source) -> torch.dtype:
        if self.options.dtype != "auto":
            return DTYPES[self.options.dtype]
        if source.dtype == torch.float32:
            return torch.float32
        weights = source.weights.values()
        if any(source.packs(w) and w.scheme is not None and fp4(w.scheme) for w in weights):
            return source.dtype  # scales keep their own types, and their products with levels have six bits
        scales = all(_integers.misfit(w, torch.float16) is None for w in weights if source.packs(w))
        others = all(holds(w, torch.float16) for w in weights if not source.packs(w))
        return torch.float16 if scales and others else torch.float32

    def _place(self, source: Source, weight: Weight, dtype: torch.dtype) -> Placement:
        if not source.packs(weight):
            return place(weight, dtype)
        assert weight.scheme is not None
        if (kind := fp4(weight.scheme)) is not None:
            return self._place_fp4(source, weight, kind)
        least = _integers.bits(weight)
        bits = next(b for b in (2, 4, 8, 16) if b >= least) if self.options.bits == "auto" else self.options.bits
        if not least <= bits <= 8:
            problem = f"compressed-tensors cannot hold {weight.name} in {bits} bits: its levels take {least}"
            raise UPQError(f"{source.path}: {problem}")
        tensors = _unpacked(weight, dtype) if _rounds(source) else _tensors(weight, bits, dtype)
        size, loss = sum(tensor.bytes for tensor in tensors[:2]), _integers.misfit(weight, dtype)
        return Placement(weight=weight, carrier=f"int{bits}", bytes=size, loss=loss, tensors=tensors)

    def _place_fp4(self, source: Source, weight: Weight, kind: Fp4) -> Placement:
        if self.options.bits not in ("auto", 4):
            raise UPQError(f"{source.path}: {weight.name} is {kind}, in 4 bits; leave out bits={self.options.bits}")
        tensors = _fp4_tensors(weight, kind)
        size = sum(tensor.bytes for tensor in tensors)
        return Placement(weight=weight, carrier=kind, bytes=size, loss=misfit(weight), tensors=tensors)


def _fp4_tensors(weight: Weight, kind: Fp4) -> tuple[TensorPlan, ...]:
    """An artefact's bytes: a code is E2M1's own, the first of two in the low half of a byte."""
    assert weight.scheme is not None
    rows, columns = weight.shape
    dtype = torch.float8_e4m3fn if kind == "nvfp4" else torch.uint8

    def packed() -> Iterable[Tensor]:
        return (kernels.pack(weight.qtensor(start, stop).codes_OI, 4) for start, stop in weight.chunks())

    def scales() -> Iterable[Tensor]:
        return (weight.qtensor(start, stop).scale_OG.view(dtype) for start, stop in weight.chunks())

    tensors = (
        TensorPlan(name=f"{weight.name}_packed", dtype=torch.uint8, shape=(rows, columns // 2), parts=packed),
        TensorPlan(name=f"{weight.name}_scale", dtype=dtype, shape=(rows, weight.scheme.groups(columns)), parts=scales),
    )
    if kind == "mxfp4":
        return tensors

    def divisor() -> Iterable[Tensor]:
        return [torch.tensor([1 / outer(weight)])]

    return (*tensors, TensorPlan(name=f"{weight.name}_global_scale", dtype=torch.float32, shape=(1,), parts=divisor))


def _rounds(source: Source) -> bool:
    """Whether the export says how inputs are rounded."""
    return source.activations is not None and source.activations == ActScheme(bits=source.activations.bits)


def _format(p: Placement, source: Source) -> str:
    if p.carrier.startswith("int"):
        return _UNPACKED if _rounds(source) else "pack-quantized"
    return f"{p.carrier}-pack-quantized"


def _scales(weight: Weight, dtype: torch.dtype) -> TensorPlan:
    assert weight.scheme is not None

    def scales() -> Iterable[Tensor]:
        scale_OG, zero_OG = weight.scale_zero()
        return [(scale_OG.float() / _integers.step(zero_OG)).to(dtype)]

    shape = (weight.shape[0], weight.scheme.groups(weight.shape[1]))
    return TensorPlan(name=f"{weight.name}_scale", dtype=dtype, shape=shape, parts=scales)


def _unpacked(weight: Weight, dtype: torch.dtype) -> tuple[TensorPlan, ...]:
    def integers() -> Iterable[Tensor]:
        for start, stop in weight.chunks():
            yield _integers.integers(weight.qtensor(start, stop)).to(torch.int8)

    rows, columns = weight.shape
    return TensorPlan(name=weight.name, dtype=torch.int8, shape=(rows, columns), parts=integers), _scales(weight, dtype)


def _tensors(weight: Weight, bits: int, dtype: torch.dtype) -> tuple[TensorPlan, ...]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    assert weight.scheme is not None
    rows, columns = weight.shape

    def packed() -> Iterable[Tensor]:
        for start, stop in weight.chunks():
            yield pack_to_int32(_integers.integers(weight.qtensor(start, stop)).to(torch.int8), bits)

    def shape() -> Iterable[Tensor]:
        return [torch.tensor(weight.shape)]

    words = -(-columns * bits // 32)
    return (
        TensorPlan(name=f"{weight.name}_packed", dtype=torch.int32, shape=(rows, words), parts=packed),
        _scales(weight, dtype),
        TensorPlan(name=f"{weight.name}_shape", dtype=torch.int64, shape=(2,), parts=shape),
    )


def _groups(plan: Plan) -> dict[str, list[str]]:
    """The packed weights by what they have in common, under the name of their group in the config."""
    found: dict[tuple[str, int], list[str]] = {}
    for p in plan.placements:
        if p.packed:
            assert p.weight.scheme is not None
            found.setdefault((p.carrier, p.weight.scheme.group_size), []).append(p.weight.name)
    return {f"group_{i}": names for i, names in enumerate(found.values())}


def _config(source: Source, plan: Plan) -> dict[str, Any]:
    groups, placements = _groups(plan), {p.weight.name: p for p in plan.placements}
    packed = {name for names in groups.values() for name in names}
    described = {}
    for group, names in groups.items():
        p = placements[names[0]]
        assert p.weight.scheme is not None
        size = p.weight.scheme.group_size
        grouped: dict[str, Any] = (
            {"strategy": "channel"} if size == PER_CHANNEL else {"strategy": "group", "group_size": size}
        )
        kind = "int"
        if p.carrier == "nvfp4":
            kind, grouped = "float", {**grouped, "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        elif p.carrier == "mxfp4":
            kind, grouped = "float", {**grouped, "scale_dtype": "torch.uint8"}
        bits = int(p.carrier.removeprefix("int")) if kind == "int" else 4
        described[group] = {
            "targets": ["Linear"] if len(groups) == 1 else [name.removesuffix(".weight") for name in names],
            "weights": {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **grouped},
        }
        if kind == "int" and _rounds(source):
            assert source.activations is not None
            token = {"type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
            described[group]["input_activations"] = {"num_bits": source.activations.bits, **token}
    # Routers, towers and the like too: engines have them as linears. A name of the model, or of the checkpoint.
    dense = {
        name.removesuffix(".weight")
        for weight in source.weights.values()
        if weight.name not in packed and len(weight.shape) == 2 and weight.origin != f"{source.layout.embedding}.weight"
        for name in (weight.name, weight.origin)
        if name.endswith(".weight")
    }
    return {
        "quant_method": "compressed-tensors",
        "format": next(_format(p, source) for p in plan.placements if p.packed),
        "quantization_status": "compressed",
        "ignore": sorted({source.layout.head, *dense}),
        "config_groups": described,
    }


EXPORTS.register("compressed_tensors")(CompressedTensors)

"""GPTQ's layout, version 2 (zero points stored as they are): GPTQModel, AutoRound, vLLM and SGLang.

`sym` and `q2_0` are exact in as many bits as they have; SEQ, whose zero point is no integer, as -3, -1, 1, 3 on half
the scale in four. Columns of the files are rows of the weight: everything is packed along the input features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.scheme import PER_CHANNEL, QTensor
from upq.exports import _integers as integers
from upq.exports import _words as words
from upq.exports._base import EXPORTS, Placement, Plan
from upq.exports._directory import SafetensorsExporter, Stored
from upq.exports._source import Source, Weight
from upq.exports.dense import dense_dtype, place
from upq.files.tensors import TensorPlan

_BITS = (2, 4, 8)  # GPTQ's three bits are packed in a way of their own
_SCALES = torch.float16


@dataclass(frozen=True, slots=True)
class _Layout:
    """Symmetric: k + 2^(bits-1) for the integers k of _integers.py. Else codes and zero points as they are."""

    bits: int
    symmetric: bool

    def codes(self, q: QTensor) -> Tensor:
        """uint8 (O, I)."""
        if not self.symmetric:
            return q.codes_OI
        return (integers.integers(q) + (1 << (self.bits - 1))).to(torch.uint8)

    def scale_zero(self, weight: Weight) -> tuple[Tensor, Tensor]:
        """As stored but for the packing, both (O, G)."""
        scale_OG, zero_OG = weight.scale_zero()
        if not self.symmetric:
            return scale_OG.to(_SCALES), zero_OG.to(torch.uint8)
        middle_OG = torch.full(zero_OG.shape, 1 << (self.bits - 1), dtype=torch.uint8)
        return (scale_OG.float() / integers.step(zero_OG)).to(_SCALES), middle_OG


class Gptq(SafetensorsExporter):
    """The linears of the blocks as codes; all else as in the artefact, which engines round to float16 on loading."""

    packages = ("safetensors",)
    forms = frozenset({"linear", "expert"})
    checked = "(q - z)·s of the stored words, by UPQ itself: GPTQModel is not in every package index and was not run"

    def plan(self, source: Source) -> Plan:
        layouts = {layout for weight in source.weights.values() if (layout := _layout(source, weight))}
        if len(layouts) != 1:
            found = "its linears need several layouts" if layouts else "no linear fits into whole words"
            raise UPQError(f"{source.path}: gptq cannot hold it: {found}")
        placements = tuple(_place(source, weight) for weight in source.weights.values())
        return Plan(
            placements=placements,
            notes=(
                "it computes in float16, to which engines round on loading what is not packed",
                *source.vllm_notes(),
            ),
            dtype=_SCALES,
        )

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        return {"dtype": plan.dtype_name, "quantization_config": _config(source)}

    def rows(self, p: Placement, stored: Stored, start: int, stop: int) -> Tensor:
        """(q - z)·s of rows of the weight, columns of the file."""
        if not p.packed:
            return super().rows(p, stored, start, stop)
        qweight, qzeros, scales, g_idx = (stored.rows(tensor.name) for tensor in p.tensors)
        bits = len(qweight) * words.WORD // len(g_idx)
        codes_OI = words.unpack(qweight[:, start:stop].T.contiguous(), bits).float()
        zero_OG = words.unpack(qzeros, bits)[:, start:stop].T.float()
        scale_OG = scales[:, start:stop].T.float()
        return (codes_OI - zero_OG[:, g_idx]) * scale_OG[:, g_idx]


def _layout(source: Source, weight: Weight) -> _Layout | None:
    """How GPTQ holds a weight; None where it stays dense."""
    scheme = weight.scheme
    if scheme is None or not source.packs(weight):
        return None
    symmetric = next((b for b in _BITS if b >= integers.bits(weight)), None)
    layout = None if symmetric is None else _Layout(symmetric, symmetric=True)
    own = next(b for b in _BITS if b >= scheme.bits)
    if not weight.scale_zero()[1].frac().any() and (symmetric is None or own < symmetric):
        layout = _Layout(own, symmetric=False)
    if layout is None:
        return None
    return layout if all(words.fills_words(size, layout.bits) for size in weight.shape) else None


def _place(source: Source, weight: Weight) -> Placement:
    layout = _layout(source, weight)
    if layout is None:
        return place(weight, dense_dtype(weight))
    tensors = _tensors(weight, layout)
    return Placement(
        weight=weight,
        carrier=f"int{layout.bits}" if layout.symmetric else f"uint{layout.bits}",
        bytes=sum(tensor.bytes for tensor in tensors),
        loss=integers.misfit(weight, _SCALES),
        tensors=tensors,
    )


def _tensors(weight: Weight, layout: _Layout) -> tuple[TensorPlan, ...]:
    assert weight.scheme is not None
    bits, (rows, columns) = layout.bits, weight.shape
    groups, module = weight.scheme.groups(columns), weight.name.removesuffix(".weight")

    def qweight() -> Iterable[Tensor]:  # the packed weight as a whole, for its columns are what is written first
        parts = [words.pack(layout.codes(weight.qtensor(start, stop)), bits) for start, stop in weight.chunks()]
        return [torch.cat(parts).T]

    kinds = {
        "qweight": (torch.int32, (columns * bits // words.WORD, rows), qweight),
        "qzeros": (
            torch.int32,
            (groups, rows * bits // words.WORD),
            lambda: [words.pack(layout.scale_zero(weight)[1].T.contiguous(), bits)],
        ),
        "scales": (_SCALES, (groups, rows), lambda: [layout.scale_zero(weight)[0].T]),
        "g_idx": (
            torch.int32,
            (columns,),
            lambda: [torch.arange(columns, dtype=torch.int32) // (columns // groups)],
        ),
    }
    return tuple(TensorPlan(name=f"{module}.{kind}", dtype=d, shape=s, parts=p) for kind, (d, s, p) in kinds.items())


def _config(source: Source) -> dict[str, Any]:
    packed = [(w, layout) for w in source.weights.values() if (layout := _layout(source, w))]
    (weight, layout), names = packed[0], {w.name for w, _ in packed}
    assert weight.scheme is not None
    size = weight.scheme.group_size
    dense = [path.removesuffix(".weight") for path in source.linears if path not in names]
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": layout.bits,
        "group_size": -1 if size == PER_CHANNEL else size,
        "sym": layout.symmetric,
        "desc_act": False,
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": {f"-:^{re.escape(path)}$": {} for path in sorted([*dense, *source.fused(dense)])},
        "meta": {"quantizer": ["upq"]},
    }


EXPORTS.register("gptq")(Gptq)

"""OpenVINO: a stateful causal model whose quantised linears are u2 (or u4, u8) constants, as openvino-genai runs them.

A packed weight is Convert(u2) - zero, times scale, all in float32: exact by the graph's own meaning. The CPU plug-in
keeps the constant packed and multiplies with it directly. `split: 3` writes a linear of grid `splitquant` as three,
each a u4 constant with one scale and one zero point.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upq import kernels
from upq.core.progress import Progress
from upq.core.scheme import QuantScheme
from upq.exports import _decoder as decoder
from upq.exports import _split as split
from upq.exports._base import EXPORTS, Placement, Plan, Rows
from upq.exports._directory import DirectoryExporter
from upq.exports._source import Source, Weight, plain
from upq.exports.dense import place
from upq.grids import GRIDS

if TYPE_CHECKING:
    import openvino

_FILE = "openvino_model.xml"
_COUNTED = re.compile(r"[A-Za-z]\w*_\d+(\.\d+)?")  # names that OpenVINO gives


class OpenVino(DirectoryExporter):
    """openvino_model.xml and .bin; where openvino-tokenizers is installed, the tokenizer as OpenVINO models too.

    The packed weights are in memory together while the file is written: OpenVINO's own writer wants the whole graph.
    """

    Config = split.SplitOptions
    packages = ("openvino",)
    checked = "OpenVINO's CPU plug-in, which computes each weight from its constants"

    options: split.SplitOptions

    def holds(self, scheme: QuantScheme) -> bool:
        return plain(scheme) or (self.options.split is not None and split.splits(scheme))

    def plan(self, source: Source) -> Plan:
        decoder.check(source)
        if self.options.split is not None:
            split.check(source)
        return Plan(placements=tuple(_place(source, weight) for weight in source.weights.values()))

    def save(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        graph = _OvGraph(source)  # held until the file is written: it owns what the constants point into
        _save(graph.model(), out / _FILE)
        _tokenizer(source, out)
        progress.advance(len(plan.placements))

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        return {"dtype": plan.dtype_name}

    def read(self, source: Source, plan: Plan, out: Path) -> Iterator[tuple[str, Rows]]:
        import openvino

        core = openvino.Core()
        model = core.read_model(out / _FILE)  # held: its constants point into the mapped file
        nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}

        def computed(name: str) -> Tensor:
            part = openvino.Model([nodes[name].output(0)], [], "weight")
            exact = {"INFERENCE_PRECISION_HINT": "f32"}
            return torch.from_numpy(core.compile_model(part, "CPU", exact)([])[0].copy())

        for p in plan.placements:
            if p.carrier == split.CARRIER:
                each = [computed(_part_name(part)) for part in split.parts(p.weight)]
                yield p.weight.name, partial(_part, each[0] + each[1] + each[2])
            elif source.packs(p.weight):
                yield p.weight.name, partial(_part, computed(p.weight.name))
            else:
                yield p.weight.name, partial(_constant_rows, nodes[p.weight.name], p.weight)


def _place(source: Source, weight: Weight) -> Placement:
    if not source.packs(weight):
        return place(weight, decoder.dense_dtype(weight))
    scheme = weight.scheme
    assert scheme is not None
    if split.splits(scheme):
        return Placement(weight=weight, carrier=split.CARRIER, bytes=split.bytes_of(weight))
    bits, groups = decoder.code_bits(scheme), weight.shape[0] * scheme.groups(weight.shape[1])
    zeros = groups if GRIDS.get(scheme.grid).zero(scheme) is None else 1
    size = -(-weight.numel * bits // 8) + groups * _scale_dtype(scheme).itemsize + 2 * zeros
    return Placement(weight=weight, carrier=f"u{bits}", bytes=size)


def _scale_dtype(scheme: QuantScheme) -> torch.dtype:
    """float16, or float32 where that does not hold the scales."""
    return torch.float16 if scheme.scale_torch_dtype == torch.float16 else torch.float32


def _part_name(part: split.Part) -> str:
    return f"{part.weight.name}.{part.index}"


def _part(weight: Tensor, start: int, stop: int) -> Tensor:
    return weight[start:stop]


def _constant_rows(node: Any, weight: Weight, start: int, stop: int) -> Tensor:
    """Rows of a constant that is not packed."""
    data = node.data[start:stop]
    if weight.dtype == torch.bfloat16 and decoder.dense_dtype(weight) == torch.bfloat16:
        return torch.from_numpy(data.view("int16").copy()).view(torch.bfloat16).float()
    return torch.from_numpy(data.copy()).float()


def _tokenizer(source: Source, out: Path) -> None:
    """The tokenizer as openvino-genai wants it, where the package for that is there."""
    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError:
        return
    models = convert_tokenizer(source.tokenizer(), with_detokenizer=True)
    for model, name in zip(models, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
        _save(model, out / f"{name}.xml")


def _save(model: openvino.Model, file: Path) -> None:
    """With the same bytes every time: OpenVINO names nodes and tensors by a counter that never starts again."""
    import openvino

    for i, node in enumerate(model.get_ordered_ops()):
        own = f"{node.get_type_name()}_{i}"
        if _COUNTED.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(own)
        for output in node.outputs():
            names = output.get_names()
            output.get_tensor().set_names({own if _COUNTED.fullmatch(name) else name for name in names})
    try:
        openvino.save_model(model, file, compress_to_fp16=False)
    except RuntimeError as error:  # a full disk is "basic_ios::clear: iostream error"
        raise OSError(f"OpenVINO: {error}") from error


class _OvGraph:
    """The operations of _decoder.Graph in OpenVINO's opset 13; keys and values are the model's own state."""

    def __init__(self, source: Source) -> None:
        from openvino import opset13

        self.op, self.source = opset13, source
        self.made: dict[str, Any] = {}
        self.buffers: list[Any] = []  # that constants point into

    def model(self) -> openvino.Model:
        import numpy as np
        import openvino
        from openvino.op.util import Variable, VariableInfo

        op, shape = self.op, decoder.Shape.of(self.source.config)
        names = ("input_ids", "attention_mask", "position_ids")
        given = [op.parameter([-1, -1], np.int64, name=name) for name in names]
        beam = op.parameter([-1], np.int32, name="beam_idx")
        for parameter, name in zip([*given, beam], [*names, "beam_idx"], strict=True):
            parameter.output(0).get_tensor().set_names({name})
        texts = op.gather(op.shape_of(given[0], "i64"), np.array([0]), np.array(0))
        sizes = [np.array([value], np.int64) for value in (shape.kv_heads, 0, shape.head_dim)]
        empty = op.broadcast(op.constant(np.float32(0)), op.concat([texts, *map(op.constant, sizes)], 0))
        variables, past = [], []
        for i in range(shape.blocks):
            pair = []
            for kind in ("key", "value"):
                info = VariableInfo()
                info.data_shape = openvino.PartialShape([-1, shape.kv_heads, -1, shape.head_dim])
                info.data_type = openvino.Type.f32
                info.variable_id = f"past_key_values.{i}.{kind}present.{i}.{kind}"
                variable = Variable(info)
                variables.append(variable)
                state = openvino.opset6.read_value(empty, variable)
                pair.append(op.gather(state, beam, np.array(0)))  # beams are reordered before they grow
            past.append((pair[0], pair[1]))
        outputs = decoder.decoder(self, self.source, decoder.Inputs(given[0], given[1], given[2], past))
        present = [value for pair in outputs.present for value in pair]
        sinks = [openvino.opset6.assign(value, v) for value, v in zip(present, variables, strict=True)]
        logits = op.result(outputs.logits_NTV)
        logits.output(0).get_tensor().set_names({"logits"})
        return openvino.Model([logits], sinks, [*given, beam], self.source.name)

    def constant(self, value: Tensor) -> Any:
        return self.op.constant(value.numpy())

    def vector(self, name: str) -> Any:
        return self._dense(name)

    def embed(self, ids_NT: Any, name: str) -> Any:
        import numpy as np

        return self.to_float(self.op.gather(self._dense(name), ids_NT, np.array(0)))

    def linear(self, x: Any, name: str) -> Any:
        if self.source.packs(self.source.weights[name]) and split.splits(self.source.weights[name].scheme):
            parts = split.parts(self.source.weights[name])
            each = [self.op.matmul(x, self._part(part), False, True) for part in parts]
            return self.add(self.add(each[0], each[1]), each[2])
        packed = self.source.packs(self.source.weights[name])
        weight = self._packed(name) if packed else self.to_float(self._dense(name))
        return self.op.matmul(x, weight, False, True)

    def add(self, a: Any, b: Any) -> Any:
        return self.op.add(a, b)

    def multiply(self, a: Any, b: Any) -> Any:
        return self.op.multiply(a, b)

    def matmul(self, a: Any, b: Any) -> Any:
        return self.op.matmul(a, b, False, False)

    def rsqrt(self, x: Any) -> Any:
        import numpy as np

        return self.op.divide(np.float32(1), self.op.sqrt(x))

    def mean(self, x: Any) -> Any:
        import numpy as np

        return self.op.reduce_mean(x, np.array([-1]), True)

    def sigmoid(self, x: Any) -> Any:
        return self.op.sigmoid(x)

    def softmax(self, x: Any) -> Any:
        return self.op.softmax(x, -1)

    def cos(self, x: Any) -> Any:
        return self.op.cos(x)

    def sin(self, x: Any) -> Any:
        return self.op.sin(x)

    def to_float(self, x: Any) -> Any:
        return self.op.convert(x, "f32")

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        import numpy as np

        return self.op.reshape(x, np.array(shape, np.int64), True)

    def transpose(self, x: Any, order: Sequence[int]) -> Any:
        import numpy as np

        return self.op.transpose(x, np.array(order, np.int64))

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        return self.op.concat(list(parts), axis)

    def part(self, x: Any, start: int, stop: int) -> Any:
        import numpy as np

        return self.op.slice(x, *(np.array([value], np.int64) for value in (start, stop, 1, -1)))

    def running_count(self, mask_NS: Any) -> Any:
        import numpy as np

        return self.op.cum_sum(mask_NS, np.array(1))

    def bias_where(self, query: Any, key: Any, mask: Any, window: int | None) -> Any:
        import numpy as np

        op = self.op
        reads = op.logical_and(op.less_equal(key, query), op.greater(mask, np.float32(0.5)))
        if window is not None:
            reads = op.logical_and(reads, op.greater(key, op.subtract(query, np.float32(window))))
        return op.select(reads, np.float32(0), np.finfo(np.float32).min)

    def _dense(self, name: str) -> Any:
        """A weight as it is stored, one constant however often it is used."""
        import openvino

        if name not in self.made:
            weight = self.source.weights[name]
            dtype = decoder.dense_dtype(weight)
            full = torch.cat([weight.dequantize(start, stop).to(dtype) for start, stop in weight.chunks()])
            kinds = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
            raw = full.view(torch.int16).numpy() if dtype == torch.bfloat16 else full.numpy()
            self.buffers.append(raw)
            tensor = openvino.Tensor(raw, full.shape, getattr(openvino.Type, kinds[dtype]))
            self.made[name] = self._named(openvino.op.Constant(tensor), name)
        return self.made[name]

    def _packed(self, name: str) -> Any:
        """(Convert(codes) - zero)·scale, reshaped to (O, I)."""
        import numpy as np
        import openvino

        op, weight = self.op, self.source.weights[name]
        scheme = weight.scheme
        assert scheme is not None
        bits = decoder.code_bits(scheme)
        rows, columns = weight.shape
        groups = scheme.groups(columns)
        # the rows follow each other without a gap: a row need not end with a byte
        codes_OI = torch.cat([weight.qtensor(start, stop).codes_OI for start, stop in weight.chunks()])
        packed = kernels.pack(codes_OI.view(1, -1), bits).view(-1).numpy()
        self.buffers.append(packed)
        shape = [rows, groups, columns // groups] if groups > 1 else [rows, columns]
        codes = openvino.op.Constant(openvino.Tensor(packed, shape, getattr(openvino.Type, f"u{bits}")))
        scale_OG, zero_OG = weight.scale_zero()
        one = GRIDS.get(scheme.grid).zero(scheme)
        zero = zero_OG if one is None else torch.tensor([[one]])
        if groups > 1:
            scale_OG, zero = scale_OG[..., None], zero[..., None]
        # zero points are halves or integers below 256: float16 holds them
        stored = [zero.half(), scale_OG.to(_scale_dtype(scheme))]
        zeros, scales = (self.to_float(op.constant(np.ascontiguousarray(value.numpy()))) for value in stored)
        exact = op.multiply(op.subtract(self.to_float(codes), zeros), scales)
        dense = exact if groups == 1 else op.reshape(exact, np.array([rows, columns], np.int64), False)
        return self._named(dense, name)

    def _part(self, part: split.Part) -> Any:
        """(Convert(codes) - zero)·scale, (O, I), of one part of a weight that is split."""
        import numpy as np
        import openvino

        packed = torch.cat([codes.flatten() for codes in part.packed()]).numpy()
        self.buffers.append(packed)
        codes = openvino.op.Constant(openvino.Tensor(packed, list(part.weight.shape), openvino.Type.u4))
        shifted = self.op.subtract(self.to_float(codes), self.op.constant(np.float32(part.zero)))
        return self._named(self.op.multiply(shifted, self.op.constant(np.float32(part.scale))), _part_name(part))

    def _named(self, node: Any, name: str) -> Any:
        node.set_friendly_name(name)
        return node


EXPORTS.register("openvino")(OpenVino)

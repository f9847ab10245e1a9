"""ONNX: a causal model with a key-value cache, its quantised linears as ONNX Runtime's MatMulNBits.

MatMulNBits keeps q packed, s in float32 for each block of a row, and multiplies x with (q - z)·s. It is written without
zero points, so z is 2^(b-1); a matrix of rank one (one column a group) makes up for what the grid's zero is instead:

    x · Ŵᵀ = x · ((q - 2^(b-1))·s)ᵀ + Σ_group(x) · ((2^(b-1) - zero)·s)ᵀ

Both terms are exact in float32, and without float zero points ONNX Runtime has a fast 2-bit kernel (int8 activations,
blocks of at most 128). `activations: float` has float zero points instead, and arithmetic in float32 throughout.

`split: 3` writes grid `splitquant` with standard operators alone, for compilers that know one scale a tensor: a linear
is three DequantizeLinear of 4-bit codes, three MatMul, two Add.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from upq import kernels
from upq.core.errors import UPQError
from upq.core.progress import Progress
from upq.core.scheme import PER_CHANNEL, QuantScheme
from upq.exports import _decoder as decoder
from upq.exports import _split as split
from upq.exports._base import EXPORTS, Placement, Plan, Rows
from upq.exports._directory import DirectoryExporter
from upq.exports._source import Source, Weight, plain
from upq.exports.dense import place
from upq.files.tensors import TensorPlan
from upq.grids import GRIDS

if TYPE_CHECKING:
    import onnx

_OPSET, _IR = 21, 10
_DATA = "model.onnx.data"
_CACHES = (("past", "past_key_values"), ("present", "present"))


class OnnxOptions(split.SplitOptions):
    # int8: MatMulNBits rounds the inputs of the linears to 8 bits, which makes it ten times as fast; logits then differ
    # as they do in llama.cpp.
    activations: Literal["float", "int8"] = "float"


class Onnx(DirectoryExporter):
    """A directory as onnxruntime-genai has it: model.onnx with its data beside it, tokenizer, genai_config.json."""

    Config = OnnxOptions
    packages = ("onnx", "onnxruntime")
    checked = "ONNX Runtime's MatMulNBits on unit vectors, each block of the stored bytes"
    options: OnnxOptions

    def holds(self, scheme: QuantScheme) -> bool:
        return plain(scheme) or (self.options.split is not None and split.splits(scheme))

    def plan(self, source: Source) -> Plan:
        decoder.check(source)
        if self.options.split is not None:
            split.check(source)
            if self._int8:
                raise UPQError("export onnx: split=3 has no MatMulNBits, which activations=int8 is of; leave one out")
        placements = tuple(self._place(source, weight) for weight in source.weights.values())
        dense = [p.weight.name for p in placements if p.weight.name in source.linears and p.carrier == "float32"]
        more = f" and {len(dense) - 1} more" if len(dense) > 1 else ""
        return Plan(placements=placements, notes=(f"{dense[0]}{more}: float32, not packed",) if dense else ())

    def save(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        import onnx

        graph = _OnnxGraph(source, plan, int8=self._int8)
        model = graph.model()
        (out / "model.onnx").write_bytes(model.SerializeToString())
        with (out / _DATA).open("wb") as file:
            for stored in graph.stored:
                for part in stored.parts():
                    file.write(part.contiguous().view(torch.uint8).numpy().data)
        assert (out / _DATA).stat().st_size == graph.offset
        onnx.checker.check_model(str(out / "model.onnx"))
        (out / "genai_config.json").write_text(json.dumps(_genai(source), indent=2) + "\n")
        progress.advance(len(plan.placements))

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        return {"dtype": plan.dtype_name}

    def read(self, source: Source, plan: Plan, out: Path) -> Iterator[tuple[str, Rows]]:
        import onnx

        graph = onnx.load(str(out / "model.onnx"), load_external_data=False).graph
        stored = {tensor.name: tensor for tensor in graph.initializer if tensor.external_data}
        for p in plan.placements:
            if p.carrier == split.CARRIER:
                yield p.weight.name, partial(_split_rows, out, stored, split.parts(p.weight))
                continue
            layout = _layout(source, p.weight, self._int8)
            read = partial(_dense_rows, out) if layout is None else partial(_packed_rows, out, layout)
            yield p.weight.name, partial(read, stored, p.weight)

    @property
    def _int8(self) -> bool:
        return self.options.activations == "int8"

    def _place(self, source: Source, weight: Weight) -> Placement:
        if source.packs(weight) and split.splits(weight.scheme):
            shape = (weight.shape[0], weight.shape[1] // 2)
            tensors = tuple(
                TensorPlan(name=_part_name(part), dtype=torch.uint8, shape=shape, parts=part.packed)
                for part in split.parts(weight)
            )
            return Placement(weight=weight, carrier=split.CARRIER, bytes=split.bytes_of(weight), tensors=tensors)
        layout = _layout(source, weight, self._int8)
        if layout is None:
            return place(weight, decoder.dense_dtype(weight))
        stored = _stored(weight, layout, self._int8)
        assert weight.scheme is not None
        # code·s and zero·s are rounded each where s has more than 16 bits
        twice = weight.scheme.scale_dtype == "float32" and len(stored) > 2
        return Placement(
            weight=weight,
            carrier=f"MatMulNBits {layout.bits}",
            bytes=sum(tensor.bytes for tensor in stored),
            loss="products with float32 scales are rounded twice" if twice else None,
            tensors=tuple(stored),
        )


# --- what is stored


@dataclass(frozen=True, slots=True)
class _Layout:
    bits: int
    block: int  # weights that share a scale, a power of two from 16 to 256

    def blocks(self, columns: int) -> int:
        return -(-columns // self.block)


def _layout(source: Source, weight: Weight, int8: bool) -> _Layout | None:
    """How MatMulNBits holds a weight; None where it cannot."""
    scheme = weight.scheme
    if scheme is None or not source.packs(weight):
        return None
    bits = decoder.code_bits(scheme)
    most = 128 if int8 and bits == 2 else 256  # the fast 2-bit kernel ends at 128
    if scheme.group_size == PER_CHANNEL:
        return _Layout(bits, min(most, max(16, 1 << (weight.shape[1] - 1).bit_length())))
    block = min(most, scheme.group_size & -scheme.group_size)
    return _Layout(bits, block) if block >= 16 else None


def _stored(weight: Weight, layout: _Layout, int8: bool) -> list[TensorPlan]:
    """Codes (O, blocks, bytes), scales (O·blocks), and what makes up for the zero point.

    That is float zero points (O·blocks), or the columns of the rank-one matrices (G, O).
    """
    scheme = weight.scheme
    assert scheme is not None
    rows, columns = weight.shape
    blocks, width = layout.blocks(columns), layout.block * layout.bits // 8
    groups, middle = scheme.groups(columns), 1 << (layout.bits - 1)

    def codes() -> Iterable[Tensor]:
        for start, stop in weight.chunks():
            padded = torch.nn.functional.pad(weight.qtensor(start, stop).codes_OI, (0, blocks * layout.block - columns))
            yield kernels.pack(padded, layout.bits)

    def spread(value_OG: Tensor) -> list[Tensor]:
        # per channel the last block may be a part of one, so the count of blocks need not divide
        return [value_OG.repeat_interleave(blocks // groups, dim=1).flatten()]

    found = [
        TensorPlan(name=f"{weight.name}_codes", dtype=torch.uint8, shape=(rows, blocks, width), parts=codes),
        TensorPlan(
            name=f"{weight.name}_scales",
            dtype=torch.float32,
            shape=(rows * blocks,),
            parts=lambda: spread(weight.scale_zero()[0].float()),
        ),
    ]
    if GRIDS.get(scheme.grid).zero(scheme) == middle:
        return found
    if int8 or layout.bits == 8:  # MatMulNBits takes no float zero points at 8 bits

        def columns_GO() -> list[Tensor]:
            scale_OG, zero_OG = weight.scale_zero()
            return [((middle - zero_OG) * scale_OG.float()).T]

        return [
            *found,
            TensorPlan(name=f"{weight.name}_shift", dtype=torch.float32, shape=(groups, rows), parts=columns_GO),
        ]
    return [
        *found,
        TensorPlan(
            name=f"{weight.name}_zeros",
            dtype=torch.float32,
            shape=(rows * blocks,),
            parts=lambda: spread(weight.scale_zero()[1]),
        ),
    ]


def _part_name(part: split.Part) -> str:
    return f"{part.weight.name}_part_{part.index}"


# --- the graph


class _OnnxGraph:
    """Nodes in the making; values go by name. Weights are external data, laid out in the order of the artefact."""

    def __init__(self, source: Source, plan: Plan, *, int8: bool) -> None:
        from onnx import helper

        self.helper, self.source, self.int8 = helper, source, int8
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.stored: list[TensorPlan] = []
        self.offset = 0
        self.constants: dict[str, str] = {}
        for p in plan.placements:
            for tensor in p.tensors:
                self._store(tensor, nibbles=p.carrier == split.CARRIER)

    def model(self) -> onnx.ModelProto:
        from onnx import TensorProto

        shape = decoder.Shape.of(self.source.config)
        cache = ("N", shape.kv_heads, "P", shape.head_dim)
        past = [(f"past_key_values.{i}.key", f"past_key_values.{i}.value") for i in range(shape.blocks)]
        inputs = decoder.Inputs("input_ids", "attention_mask", "position_ids", past)
        outputs = decoder.decoder(self, self.source, inputs)
        info = self.helper.make_tensor_value_info
        given = [
            info("input_ids", TensorProto.INT64, ("N", "T")),
            info("attention_mask", TensorProto.INT64, ("N", "S")),
            info("position_ids", TensorProto.INT64, ("N", "T")),
            *(info(name, TensorProto.FLOAT, cache) for pair in past for name in pair),
        ]
        vocabulary = self.source.weights[f"{self.source.layout.embedding}.weight"].shape[0]
        made = [self._named(outputs.logits_NTV, info("logits", TensorProto.FLOAT, ("N", "T", vocabulary)))]
        for i, pair in enumerate(outputs.present):
            for value, kind in zip(pair, ("key", "value"), strict=True):
                described = info(f"present.{i}.{kind}", TensorProto.FLOAT, ("N", shape.kv_heads, "S", shape.head_dim))
                made.append(self._named(value, described))
        graph = self.helper.make_graph(self.nodes, self.source.name, given, made, self.initializers)
        domains = [self.helper.make_opsetid("", _OPSET), self.helper.make_opsetid("com.microsoft", 1)]
        return self.helper.make_model(graph, opset_imports=domains, ir_version=_IR, producer_name="upq")

    # the operations of _decoder.Graph

    def constant(self, value: Tensor) -> str:
        from onnx import numpy_helper

        key = f"{value.dtype} {value.tolist()}"
        if key not in self.constants:
            self.constants[key] = f"constant_{len(self.constants)}"
            self.initializers.append(numpy_helper.from_array(value.numpy(), self.constants[key]))
        return self.constants[key]

    def vector(self, name: str) -> str:
        return name

    def embed(self, ids_NT: str, name: str) -> str:
        return self.to_float(self._node("Gather", name, ids_NT))

    def linear(self, x: str, name: str) -> str:
        weight = self.source.weights[name]
        if self.source.packs(weight) and split.splits(weight.scheme):
            each = [self._node("MatMul", x, self._dequantized(part)) for part in split.parts(weight)]
            return self.add(self.add(*each[:2]), each[2])
        layout = _layout(self.source, weight, self.int8)
        if layout is None:
            return self._node("MatMul", x, self._node("Transpose", self.to_float(name), perm=(1, 0)))
        names = {tensor.name for tensor in _stored(weight, layout, self.int8)}
        zeros = [f"{name}_zeros"] if f"{name}_zeros" in names else []
        rows, columns = weight.shape
        y = self._node(
            "MatMulNBits",
            *(x, f"{name}_codes", f"{name}_scales", *zeros),
            domain="com.microsoft",
            K=columns,
            N=rows,
            bits=layout.bits,
            block_size=layout.block,
            accuracy_level=4 if self.int8 else 1,
        )
        if f"{name}_shift" not in names:
            return y
        assert weight.scheme is not None
        groups = weight.scheme.groups(columns)
        parted = self.reshape(x, (0, 0, groups, columns // groups)) if groups > 1 else x
        axis = self.constant(torch.tensor([-1]))
        sums = self._node("ReduceSum", parted, axis, keepdims=int(groups == 1))
        return self.add(y, self._node("MatMul", sums, f"{name}_shift"))

    def add(self, a: str, b: str) -> str:
        return self._node("Add", a, b)

    def multiply(self, a: str, b: str) -> str:
        return self._node("Mul", a, b)

    def matmul(self, a: str, b: str) -> str:
        return self._node("MatMul", a, b)

    def rsqrt(self, x: str) -> str:
        return self._node("Reciprocal", self._node("Sqrt", x))

    def mean(self, x: str) -> str:
        return self._node("ReduceMean", x, self.constant(torch.tensor([-1])), keepdims=1)

    def sigmoid(self, x: str) -> str:
        return self._node("Sigmoid", x)

    def softmax(self, x: str) -> str:
        return self._node("Softmax", x, axis=-1)

    def cos(self, x: str) -> str:
        return self._node("Cos", x)

    def sin(self, x: str) -> str:
        return self._node("Sin", x)

    def to_float(self, x: str) -> str:
        from onnx import TensorProto

        return self._node("Cast", x, to=TensorProto.FLOAT)

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        return self._node("Reshape", x, self.constant(torch.tensor(shape)))

    def transpose(self, x: str, order: Sequence[int]) -> str:
        return self._node("Transpose", x, perm=tuple(order))

    def concat(self, parts: Sequence[str], axis: int) -> str:
        return self._node("Concat", *parts, axis=axis)

    def part(self, x: str, start: int, stop: int) -> str:
        limits = (self.constant(torch.tensor([value])) for value in (start, stop, -1))
        return self._node("Slice", x, *limits)

    def running_count(self, mask_NS: str) -> str:
        return self._node("CumSum", mask_NS, self.constant(torch.tensor(1)))

    def bias_where(self, query: str, key: str, mask: str, window: int | None) -> str:
        half, zero = self.constant(torch.tensor([0.5])), self.constant(torch.tensor([0.0]))
        reads = self._node("And", self._node("LessOrEqual", key, query), self._node("Greater", mask, half))
        if window is not None:
            oldest = self.add(query, self.constant(torch.tensor([float(-window)])))
            reads = self._node("And", reads, self._node("Greater", key, oldest))
        return self._node("Where", reads, zero, self.constant(torch.tensor([torch.finfo(torch.float32).min])))

    def _node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def _named(self, value: str, described: Any) -> Any:
        self.nodes.append(self.helper.make_node("Identity", [value], [described.name], name=described.name))
        return described

    def _dequantized(self, part: split.Part) -> str:
        """(I, O) in float32, of one part of a weight that is split."""
        from onnx import TensorProto

        zero = f"{_part_name(part)}_zero"
        self.initializers.append(self.helper.make_tensor(zero, TensorProto.UINT4, [], [part.zero]))
        given = (_part_name(part), self.constant(torch.tensor(part.scale)), zero)
        return self.transpose(self._node("DequantizeLinear", *given), (1, 0))

    def _store(self, tensor: TensorPlan, *, nibbles: bool) -> None:
        from onnx import TensorProto

        kind, shape = _kinds()[tensor.dtype], tensor.shape
        if nibbles:  # two codes a byte
            kind, shape = TensorProto.UINT4, (*shape[:-1], 2 * shape[-1])
        proto = TensorProto(name=tensor.name, data_type=kind, dims=shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", _DATA), ("offset", self.offset), ("length", tensor.bytes)):
            proto.external_data.add(key=key, value=str(value))
        self.initializers.append(proto)
        self.stored.append(tensor)
        self.offset += tensor.bytes


def _kinds() -> dict[torch.dtype, int]:
    from onnx import TensorProto

    return {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
        torch.uint8: TensorProto.UINT8,
    }


def _genai(source: Source) -> dict[str, Any]:
    """What onnxruntime-genai wants to know."""
    config, shape, ends = source.config, decoder.Shape.of(source.config), source.ends()
    names = {f"{when}_{kind}_names": f"{prefix}.%d.{kind}" for when, prefix in _CACHES for kind in ("key", "value")}
    given = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    return {
        "model": {
            "type": config.model_type,
            # Its reader takes numbers alone. It starts no text with this one, which its own builder puts for none.
            "bos_token_id": 1 if config.bos_token_id is None else config.bos_token_id,
            "eos_token_id": ends,
            "pad_token_id": config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0],
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": shape.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": shape.heads,
                "num_hidden_layers": shape.blocks,
                "num_key_value_heads": shape.kv_heads,
                "inputs": given | {name: value for name, value in names.items() if name.startswith("past")},
                "outputs": {"logits": "logits"}
                | {name: value for name, value in names.items() if name.startswith("present")},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }


# --- reading back


def _bytes(out: Path, tensor: Any, start: int, stop: int) -> bytes:
    """A range of a tensor's bytes in the data file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    with (out / entries["location"]).open("rb") as file:
        file.seek(int(entries["offset"]) + start)
        content: bytes = file.read(stop - start)
        return content


def _numbers(out: Path, tensor: Any, start: int, stop: int) -> Tensor:
    """Entries [start, stop) of a flat tensor."""
    dtype = {kind: dtype for dtype, kind in _kinds().items()}[tensor.data_type]
    size = dtype.itemsize
    return torch.frombuffer(bytearray(_bytes(out, tensor, start * size, stop * size)), dtype=dtype)


def _dense_rows(out: Path, stored: dict[str, Any], weight: Weight, start: int, stop: int) -> Tensor:
    width = weight.numel // weight.shape[0]
    flat = _numbers(out, stored[weight.name], start * width, stop * width)
    return flat.float().view(stop - start, *weight.shape[1:])


def _split_rows(out: Path, stored: dict[str, Any], parts: Sequence[split.Part], start: int, stop: int) -> Tensor:
    """The sum of ONNX Runtime's own DequantizeLinear of the three."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    columns = parts[0].weight.shape[1]
    nodes, values = [], []
    for i, part in enumerate(parts):
        codes = _bytes(out, stored[_part_name(part)], start * columns // 2, stop * columns // 2)
        values.append(helper.make_tensor(f"q{i}", TensorProto.UINT4, [stop - start, columns], codes, raw=True))
        values.append(numpy_helper.from_array(torch.tensor(part.scale).numpy(), f"s{i}"))
        values.append(helper.make_tensor(f"z{i}", TensorProto.UINT4, [], [part.zero]))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}", f"z{i}"], [f"w{i}"]))
    nodes.append(helper.make_node("Sum", [f"w{i}" for i in range(len(parts))], ["w"]))
    made = helper.make_tensor_value_info("w", TensorProto.FLOAT, [stop - start, columns])
    graph = helper.make_graph(nodes, "rows", [], [made], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {})[0])


def _packed_rows(out: Path, layout: _Layout, stored: dict[str, Any], weight: Weight, start: int, stop: int) -> Tensor:
    """Rows as ONNX Runtime multiplies with them: the stored blocks, side by side as the rows of one small matrix.

    The bytes of (O, I) with `blocks` blocks a row are those of (O·blocks, block), so that unit vectors of one block
    show every weight at the cost of `block` products each.
    """
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    blocks, rows = layout.blocks(weight.shape[1]), stop - start
    width = layout.block * layout.bits // 8
    count = rows * blocks
    codes = _numbers(out, stored[f"{weight.name}_codes"], start * blocks * width, stop * blocks * width)
    values = {"codes": codes.view(count, 1, width).numpy()}
    for kind in ("scales", "zeros"):
        if f"{weight.name}_{kind}" in stored:
            values[kind] = _numbers(out, stored[f"{weight.name}_{kind}"], start * blocks, stop * blocks).numpy()
    kernel = helper.make_node(
        "MatMulNBits", ["x", *values], ["y"], domain="com.microsoft", K=layout.block, N=count, bits=layout.bits,
        block_size=layout.block, accuracy_level=1,
    )  # fmt: skip
    floats = (TensorProto.FLOAT, [None, None])
    graph = helper.make_graph(
        [kernel],
        "blocks",
        [helper.make_tensor_value_info("x", *floats)],
        [helper.make_tensor_value_info("y", *floats)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    domains = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=_IR)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    read = torch.from_numpy(session.run(None, {"x": np.eye(layout.block, dtype=np.float32)})[0])
    dense = read.T.reshape(rows, blocks * layout.block)[:, : weight.shape[1]]
    shift = stored.get(f"{weight.name}_shift")
    if shift is None:
        return dense.contiguous()
    groups, every = shift.dims
    shift_GO = _numbers(out, shift, 0, groups * every).view(groups, every)[:, start:stop]
    return dense + shift_GO.T.repeat_interleave(weight.shape[1] // groups, dim=1)


EXPORTS.register("onnx")(Onnx)

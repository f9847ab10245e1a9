"""MNN: a directory as MNN's own language model runtime has it, for phones (Arm, Metal, OpenCL) and processors.

A linear is MNN's 1×1 convolution with packed codes q and two numbers for each row or group, and multiplies with
(q - 2^(b-1))·scale + zero. With the scale as it is and zero = (2^(b-1) - z)·scale that is (q - z)·scale exactly.

The runtime looks embeddings up in a file of bfloat16. A model in float16 or float32 gets two or three columns for each
of its own, whose sum is the exact number; the graph adds them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.precision import dtype_name
from upq.core.progress import Progress
from upq.exports import _decoder as decoder
from upq.exports._base import EXPORTS, Exporter, Options, Placement, Plan, Rows
from upq.exports._mtok import chat_template, mtok
from upq.exports._source import Source, Weight
from upq.exports.dense import holds
from upq.files.tensors import TensorPlan
from upq.model.windows import window

_GRAPH, _WEIGHTS, _EMBEDDINGS = "llm.mnn", "llm.mnn.weight", "embeddings_bf16.bin"
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # numbers of 8 bits whose sum has 8, 11 or 24
_SHORT = 65535  # the largest dimension that a blob keeps in 16 bits
_END = 1 << 30


class MnnOptions(Options):
    # int8: the runtime rounds the inputs of the linears to 8 bits and keeps the weights packed. float: it unpacks them
    # to float32 when it loads, and rounds nothing. config.json has the choice (`memory`, `precision`).
    activations: Literal["int8", "float"] = "int8"


class Mnn(Exporter):
    """llm.mnn with its weights beside it, embeddings, tokenizer.mtok, llm_config.json and config.json."""

    Config = MnnOptions
    packages = ("MNN",)
    install = "'upq[phones]'"
    checked = "MNN's own operations on unit vectors, from the stored file; embeddings from theirs"
    options: MnnOptions

    def plan(self, source: Source) -> Plan:
        decoder.check(source)
        _windows(source)
        mtok(source.tokenizer(), source.ends())  # what it cannot hold is refused now
        return Plan(placements=tuple(_place(source, weight) for weight in source.weights.values()))

    def write(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        out.mkdir()
        offsets: dict[str, int] = {}
        with (out / _WEIGHTS).open("wb") as weights, (out / _EMBEDDINGS).open("wb") as embeddings:
            for p in plan.placements:
                for tensor in p.tensors:
                    file = embeddings if tensor.name.endswith("_bf16") else weights
                    offsets[tensor.name] = file.tell()
                    for part in tensor.parts():
                        file.write(part.contiguous().view(torch.uint8).numpy().data)
                    assert file.tell() - offsets[tensor.name] == tensor.bytes
                progress.advance(1)
        if not (out / _EMBEDDINGS).stat().st_size:
            (out / _EMBEDDINGS).unlink()
        graph = _MnnGraph(source, plan, offsets)
        _save(graph.model(), out / _GRAPH)
        (out / "tokenizer.mtok").write_bytes(mtok(source.tokenizer(), source.ends()))
        config = {"llm_model": _GRAPH, "llm_weight": _WEIGHTS, "tokenizer_file": "tokenizer.mtok", **self._settings()}
        _write_json(out / "config.json", config)
        _write_json(out / "llm_config.json", _llm_config(source, graph))

    def read(self, source: Source, plan: Plan, out: Path) -> Iterator[tuple[str, Rows]]:
        graph = _MnnGraph(source, plan, _offsets(plan))  # where everything is by the plan alone
        for p in plan.placements:
            reads = [] if p.weight.name not in graph.multiplied and len(p.weight.shape) == 2 else [graph.read(p, out)]
            if p.weight.name == graph.embedding.name:
                reads.append(_embeddings(p, out, graph.offsets))
            yield p.weight.name, partial(_agreed, p.weight, reads)

    def _settings(self) -> dict[str, Any]:
        rounded = self.options.activations == "int8"
        return {
            "backend_type": "cpu",
            "thread_num": 4,
            "precision": "low" if rounded else "high",
            "memory": "low" if rounded else "high",
            "sampler_type": "greedy",
        }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _windows(source: Source) -> int | None:
    """The one sliding window that some blocks have."""
    found = {window(source.config, i) for i in range(decoder.Shape.of(source.config).blocks)} - {None}
    if len(found) > 1:
        raise UPQError(f"{source.path}: blocks have windows of {sorted(map(str, found))} tokens, and MNN knows one")
    return next(iter(found), None)


def _llm_config(source: Source, graph: _MnnGraph) -> dict[str, Any]:
    """What the runtime wants to know of the model."""
    tokenizer, seen = source.tokenizer(), _windows(source)
    found: dict[str, Any] = {
        "model_type": source.config.model_type,
        "hidden_size": graph.embedding.shape[1] * graph.columns,  # what it reads for a token
        "layer_nums": decoder.Shape.of(source.config).blocks,
        "attention_mask": "float",
        "attention_type": "full" if seen is None else "mix",
        "is_mrope": False,
    }
    if seen is not None:
        found["sliding_window"] = seen
    if template := chat_template(tokenizer):
        begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
        found["jinja"] = {"chat_template": template, "bos": begin, "eos": end}
    if graph.embedding.scheme is not None:
        name = graph.embedding.name
        codes, alpha = graph.tensors[f"{name}_codes"], graph.tensors[f"{name}_alpha"]
        group = graph.embedding.scheme.group_size
        found["tie_embeddings"] = {
            "weight_offset": graph.offsets[codes.name],
            "alpha_offset": graph.offsets[alpha.name],
            "alpha_size": alpha.bytes,
            "quant_bit": _bits(source, graph.embedding),
            "quant_block": max(group, 0),
            "alpha_dtype": "fp32",
        }
    return found


# --- what is stored


def _place(source: Source, weight: Weight) -> Placement:
    if weight.scheme is not None:
        tensors, carrier, loss = _packed(source, weight), f"w{_bits(source, weight)}", _rounded(source, weight)
    elif len(weight.shape) == 1:
        tensors, carrier, loss = [_numbers(weight, torch.float32), _zeros(weight)], "float32", None
    else:
        tensors, kinds, loss = [], [], None
        looked_up = weight.name == f"{source.layout.embedding}.weight"
        if looked_up:
            tensors.append(_in_parts(weight))
            kinds.append(f"bfloat16 ×{_PARTS[weight.dtype]}")
            loss = None if _has_parts(weight) else "a number is too small for parts of bfloat16"
        if source.tied or not looked_up:
            dtype = torch.float16 if holds(weight, torch.float16) else torch.float32
            tensors += [_numbers(weight, dtype)] + ([_zeros(weight)] if dtype == torch.float32 else [])
            kinds.append(dtype_name(dtype))
        carrier = ", ".join(kinds)
    size = sum(tensor.bytes for tensor in tensors)
    return Placement(weight=weight, carrier=carrier, bytes=size, loss=loss, tensors=tuple(tensors))


def _bits(source: Source, weight: Weight) -> int:
    assert weight.scheme is not None
    least = 4 if weight.name == f"{source.layout.embedding}.weight" else 2  # the runtime looks up 4 and 8
    return max(least, decoder.code_bits(weight.scheme))


def _packed(source: Source, weight: Weight) -> list[TensorPlan]:
    """Shape and levels, codes (most significant first, rows without a gap), zero and scale of each group."""
    scheme, bits = weight.scheme, _bits(source, weight)
    assert scheme is not None
    rows, columns = weight.shape
    size = torch.tensor(weight.shape, dtype=torch.int32 if max(weight.shape) > _SHORT else torch.uint16)
    levels = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=torch.int8)
    head = torch.cat(
        [
            torch.tensor([2], dtype=torch.uint8),
            size.view(torch.uint8),
            torch.tensor([len(levels) % 256], dtype=torch.uint8),
            levels.view(torch.uint8),
        ]
    )
    return [
        TensorPlan(name=f"{weight.name}_head", dtype=torch.uint8, shape=tuple(head.shape), parts=lambda: [head]),
        TensorPlan(
            name=f"{weight.name}_codes",
            dtype=torch.uint8,
            shape=(-(-weight.numel * bits // 8),),
            parts=partial(_codes, weight, bits),
        ),
        TensorPlan(
            name=f"{weight.name}_alpha",
            dtype=torch.float32,
            shape=(rows, scheme.groups(columns), 2),
            parts=lambda: [_alpha(weight, bits)],
        ),
    ]


def _codes(weight: Weight, bits: int) -> Iterator[Tensor]:
    each = 8 // bits
    rest = torch.empty(0, dtype=torch.uint8)
    for start, stop in weight.chunks():
        flat = torch.cat([rest, weight.qtensor(start, stop).codes_OI.flatten()])
        whole = len(flat) // each * each
        yield _bytes(flat[:whole], bits)
        rest = flat[whole:]
    if len(rest):
        yield _bytes(torch.nn.functional.pad(rest, (0, each - len(rest))), bits)


def _bytes(codes: Tensor, bits: int) -> Tensor:
    parts = codes.view(-1, 8 // bits)
    packed = torch.zeros(len(parts), dtype=torch.uint8)
    for i in range(8 // bits):
        packed |= parts[:, i] << (8 - bits - i * bits)
    return packed


def _alpha(weight: Weight, bits: int) -> Tensor:
    """(O, G, 2) float32."""
    scale_OG, zero_OG = weight.scale_zero()
    return torch.stack([((1 << (bits - 1)) - zero_OG) * scale_OG.float(), scale_OG.float()], -1)


def _rounded(source: Source, weight: Weight) -> str | None:
    """Why MNN's sum is not exactly the weight, or None; scales of 16 bits leave room for both products."""
    scheme, bits = weight.scheme, _bits(source, weight)
    assert scheme is not None
    if scheme.scale_dtype != "float32":
        return None
    for start, stop in weight.chunks():
        q = weight.qtensor(start, stop)
        zero_OG1, scale_OG1 = _alpha(weight, bits)[start:stop].unbind(-1)
        codes_OGS = q.codes_OI.view(stop - start, scale_OG1.shape[1], -1).float() - (1 << (bits - 1))
        sums = codes_OGS * scale_OG1[..., None] + zero_OG1[..., None]
        if not torch.equal(sums.view(q.codes_OI.shape), q.dequantize()):
            return "products with float32 scales are rounded twice"
    return None


def _numbers(weight: Weight, dtype: torch.dtype) -> TensorPlan:
    def parts() -> Iterable[Tensor]:
        return (weight.dequantize(start, stop).to(dtype) for start, stop in weight.chunks())

    return TensorPlan(name=f"{weight.name}_numbers", dtype=dtype, shape=weight.shape, parts=parts)


def _zeros(weight: Weight) -> TensorPlan:
    """What MNN adds after a norm or a product in float32, though there is nothing to add."""
    zeros = torch.zeros(weight.shape[:1])
    return TensorPlan(name=f"{weight.name}_beta", dtype=torch.float32, shape=zeros.shape, parts=lambda: [zeros])


def _split(numbers: Tensor, parts: int) -> Tensor:
    """Numbers in float32 as sums of `parts` in bfloat16, on a new axis before the last."""
    found = []
    for _ in range(parts):
        top = (numbers.view(torch.int32) & ~0xFFFF).view(torch.float32)  # towards zero
        found.append(top.bfloat16())
        numbers = numbers - top
    return torch.stack(found, -2)


def _in_parts(weight: Weight) -> TensorPlan:
    count = _PARTS[weight.dtype]

    def parts() -> Iterable[Tensor]:
        return (_split(weight.dequantize(start, stop), count) for start, stop in weight.chunks())

    rows, columns = weight.shape
    name = f"{weight.name}_bf16"
    return TensorPlan(name=name, dtype=torch.bfloat16, shape=(rows, count, columns), parts=parts)


def _has_parts(weight: Weight) -> bool:
    count = _PARTS[weight.dtype]
    exact = (weight.dequantize(start, stop) for start, stop in weight.chunks())
    return count == 1 or all(torch.equal(_split(each, count).float().sum(-2), each) for each in exact)


def _offsets(plan: Plan) -> dict[str, int]:
    """Where the tensors begin in their files."""
    found, ends = {}, {True: 0, False: 0}
    for tensor in (tensor for p in plan.placements for tensor in p.tensors):
        file = tensor.name.endswith("_bf16")
        found[tensor.name] = ends[file]
        ends[file] += tensor.bytes
    return found


# --- the graph


class _MnnGraph:
    """Operations in MNN's schema as JSON, which MNN's converter makes a file of; values are numbers of tensors."""

    def __init__(self, source: Source, plan: Plan, offsets: dict[str, int]) -> None:
        self.source, self.offsets = source, offsets
        self.tensors = {tensor.name: tensor for p in plan.placements for tensor in p.tensors}
        self.operations: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.embedding = source.weights[f"{source.layout.embedding}.weight"]
        self.head = self.embedding.name if source.tied else f"{source.layout.head}.weight"
        self.columns = _PARTS[self.embedding.dtype] if self.embedding.scheme is None else 1
        self.multiplied = {self.head, *(name for name in source.linears)}

    def model(self) -> dict[str, Any]:
        ids = self.given("input_ids", [-1, 1, self.embedding.shape[1] * self.columns])
        mask = self.given("attention_mask", [1, 1, -1, -1])
        positions = self.given("position_ids", [1, -1], "DT_INT32")
        index = self.given("logits_index", [1], "DT_INT32")
        blocks = decoder.Shape.of(self.source.config).blocks
        inputs = decoder.Inputs(ids, mask, positions, [(mask, mask)] * blocks)  # the cache is MNN's
        # MNN's Attention and LayerNorm stand for the operations of a graph that this one has not.
        outputs = _MnnDecoder(cast(Any, self), self.source, inputs, index).run()
        self.names[outputs.logits_NTV] = "logits"
        return self._file(["logits"])

    def read(self, p: Placement, out: Path) -> Tensor:
        """A whole weight in float32, as MNN's runtime computes it from the stored file."""
        self.operations, self.names = [], []
        name = p.weight.name
        if len(p.weight.shape) == 1:
            return _run(self._renamed(self.vector(name)), out, []).view(-1)
        x = self.given("x", [1, -1, p.weight.shape[1]])
        model = self._renamed(self.linear(x, name))
        eye = torch.eye(p.weight.shape[1])
        # a few unit vectors at a time: of many MNN makes sums of parts of the matrix, to save products
        parts = [eye[i : i + 8] for i in range(0, len(eye), 8)]
        return _run(model, out, parts).view(-1, p.weight.shape[0]).T.contiguous()

    def _renamed(self, value: int) -> dict[str, Any]:
        self.names[value] = "y"
        return self._file(["y"])

    def _file(self, made: list[str]) -> dict[str, Any]:
        return {
            "bizCode": "upq",
            "oplists": self.operations,
            "outputName": made,
            "preferForwardType": "CPU",
            "sourceType": "ONNX",
            "tensorName": self.names,
            "tensorNumber": len(self.names),
        }

    # the operations of _decoder.Graph

    def given(self, name: str, shape: list[int], kind: str = "DT_FLOAT") -> int:
        return self._node("Input", "Input", {"dims": shape, "dtype": kind, "dformat": "NCHW"}, (), name)

    def constant(self, value: Tensor) -> int:
        kind, key = ("DT_FLOAT", "float32s") if value.is_floating_point() else ("DT_INT32", "int32s")
        blob = {"dims": list(value.shape), "dataFormat": "NCHW", "dataType": kind, key: value.flatten().tolist()}
        return self._node("Const", "Blob", blob, ())

    def vector(self, name: str) -> int:
        tensor = self.tensors[f"{name}_numbers"]
        blob = {"dims": list(tensor.shape), "dataFormat": "NCHW", "dataType": "DT_FLOAT"}
        return self._node("Const", "Blob", blob | {"external": [self.offsets[tensor.name], tensor.bytes]}, ())

    def norm(self, x: int, name: str, eps: float) -> int:
        gamma, beta = self.tensors[f"{name}_numbers"], self.tensors[f"{name}_beta"]
        assert self.offsets[beta.name] == self.offsets[gamma.name] + gamma.bytes
        external = [self.offsets[gamma.name], gamma.bytes, beta.bytes]
        main = {"axis": [-1], "epsilon": eps, "group": 1, "useRMSNorm": True, "external": external}
        return self._node("LayerNorm", "LayerNorm", main, (x,))

    def embed(self, ids_NT: int, name: str) -> int:
        width = self.embedding.shape[1]
        x = self.reshape(ids_NT, (1, -1, width * self.columns))
        parts = [self.part(x, i * width, (i + 1) * width) for i in range(self.columns)] if self.columns > 1 else [x]
        total = parts[-1]
        for part in reversed(parts[:-1]):  # from the smallest: the sums are exact
            total = self.add(part, total)
        return total

    def linear(self, x: int, name: str) -> int:
        rows, columns = self.source.weights[name].shape
        ones = dict.fromkeys(("dilateX", "dilateY", "strideX", "strideY", "kernelX", "kernelY", "group"), 1)
        none = {"padX": 0, "padY": 0, "padMode": "CAFFE", "relu": False, "relu6": False, "hasOutputShape": False}
        common = ones | none | {"inputCount": columns, "outputCount": rows}
        main = {"common": common, **self._weight(name)}
        flat = self.reshape(x, (-1, columns, 1, 1))
        y = self._node("Convolution", "Convolution2D", main, (self._turned(flat, "NCHW", "NC4HW4"),), name)
        return self.reshape(self._turned(y, "NC4HW4", "NCHW"), (1, -1, rows))

    def add(self, a: int, b: int) -> int:
        return self._binary("ADD", a, b)

    def multiply(self, a: int, b: int) -> int:
        return self._binary("MUL", a, b)

    def sigmoid(self, x: int) -> int:
        return self._unary("SIGMOID", x)

    def cos(self, x: int) -> int:
        return self._unary("COS", x)

    def sin(self, x: int) -> int:
        return self._unary("SIN", x)

    def to_float(self, x: int) -> int:
        return self._node("Cast", "CastParam", {"srcT": "DT_INT32", "dstT": "DT_FLOAT"}, (x,))

    def reshape(self, x: int, shape: Sequence[int]) -> int:
        return self._node("Reshape", "Reshape", {"dims": list(shape), "dimType": "NCHW"}, (x,))

    def transpose(self, x: int, order: Sequence[int]) -> int:
        return self._node("Permute", "Permute", {"dims": list(order)}, (x,))

    def concat(self, parts: Sequence[int], axis: int) -> int:
        return self._node("Concat", "Axis", {"axis": axis}, parts)

    def part(self, x: int, start: int, stop: int) -> int:
        return self.slice(x, self.constant(torch.tensor([start])), stop, -1)

    def slice(self, x: int, start: int, stop: int, axis: int) -> int:
        limits = (self.constant(torch.tensor([value])) for value in (stop, axis))
        none = dict.fromkeys(("beginMask", "endMask", "ellipsisMask", "newAxisMask", "shrinkAxisMask"), 0)
        return self._node("StridedSlice", "StridedSliceParam", {**none, "fromType": 1}, (x, start, *limits))

    def squeeze(self, x: int) -> int:
        """Without the first axis."""
        return self._node("Squeeze", "SqueezeParam", {"squeezeDims": [0]}, (x,))

    def attention(self, q: int, k: int, v: int, mask: int, block: int) -> int:
        main = {"kv_cache": True, "layer_index": block, "kv_shared_layer_index": -1}
        return self._node("Attention", "AttentionParam", main, (q, k, v, mask))

    def _weight(self, name: str) -> dict[str, Any]:
        """Where a convolution's weight is, and what it is made of."""
        weight = self.source.weights[name]
        if weight.scheme is None:
            numbers = self.tensors[f"{name}_numbers"]
            offset = self.offsets[numbers.name]
            if numbers.dtype == torch.float16:
                return {"quanParameter": {"type": 3}, "external": [offset, numbers.bytes, 0, 0, 0]}
            return {"external": [offset, numbers.bytes, self.tensors[f"{name}_beta"].bytes]}
        head, codes, alpha = (self.tensors[f"{name}_{part}"] for part in ("head", "codes", "alpha"))
        quantised = {
            "type": 1,
            "aMaxOrBits": _bits(self.source, weight),
            "aMin": 1,
            "readType": alpha.shape[0] * alpha.shape[1],
            "quantScale": 1.0,
            "shapeInt32": max(weight.shape) > _SHORT,
        }
        return {
            "quanParameter": quantised,
            "external": [self.offsets[head.name], head.bytes + codes.bytes, alpha.bytes, 0, 0],
        }

    def _turned(self, x: int, source: str, dest: str) -> int:
        return self._node("ConvertTensor", "TensorConvertInfo", {"source": source, "dest": dest}, (x,))

    def _binary(self, kind: str, a: int, b: int) -> int:
        return self._node("BinaryOp", "BinaryOp", {"opType": kind, "T": "DT_FLOAT"}, (a, b))

    def _unary(self, kind: str, x: int) -> int:
        return self._node("UnaryOp", "UnaryOp", {"opType": kind, "T": "DT_FLOAT"}, (x,))

    def _node(self, kind: str, table: str, main: dict[str, Any], inputs: Sequence[int], name: str = "") -> int:
        name = name or f"{kind}_{len(self.operations)}"
        self.operations.append(
            {
                "name": name,
                "type": kind,
                "main_type": table,
                "main": main,
                "inputIndexes": list(inputs),
                "outputIndexes": [len(self.names)],
                "defaultDimentionFormat": "NHWC",
            }
        )
        self.names.append(name)
        return len(self.names) - 1


class _MnnDecoder(decoder.Decoder[int]):
    """With MNN's own norm, attention and cache."""

    def __init__(self, graph: Any, source: Source, inputs: decoder.Inputs[int], index: int) -> None:
        super().__init__(graph, source, inputs)
        self.mnn: _MnnGraph = graph
        self.index = index

    def shown(self, x: int) -> int:
        return self.mnn.slice(x, self.index, _END, 1)

    def norm(self, x: int, path: str) -> int:
        return self.mnn.norm(x, f"{path}.weight", self.shape.eps)

    def attend(self, q_NKJTD: int, k_NKTD: int, v_NKTD: int, block: int) -> tuple[int, tuple[int, int]]:
        g, s = self.mnn, self.shape
        q_NTHD = g.reshape(g.transpose(q_NKJTD, (0, 3, 1, 2, 4)), (1, -1, s.heads, s.head_dim))
        k_NTKD, v_NTKD = (g.transpose(x, (0, 2, 1, 3)) for x in (k_NKTD, v_NKTD))
        return g.attention(q_NTHD, k_NTKD, v_NTKD, self.mask(block), block), (k_NKTD, v_NKTD)

    def mask(self, block: int) -> int:
        """The runtime makes it; with windows, two of them: (2, 1, 1, T, S)."""
        if _windows(self.source) is None:
            return self.inputs.mask_NS
        seen = window(self.source.config, block)
        if seen not in self.masks:
            g, which = self.mnn, int(seen is not None)
            picked = g.slice(self.inputs.mask_NS, g.constant(torch.tensor([which])), which + 1, 0)
            self.masks[seen] = g.squeeze(picked)
        return self.masks[seen]


# --- MNN's library


@contextmanager
def _silent() -> Iterator[None]:
    """Without what MNN's libraries print."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _save(model: dict[str, Any], file: Path) -> None:
    # The module itself: MNN.tools.mnnconvert would install a package and report each use to its makers.
    with _silent():
        import _tools
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "model.json"
        text.write_text(json.dumps(model))
        with _silent():
            _tools.mnnconvert(["mnnconvert", "-f", "JSON", "--modelFile", str(text), "--MNNModel", str(file)])
    if not file.is_file():
        raise OSError(f"MNN did not write {file.name}")


def _run(model: dict[str, Any], out: Path, inputs: Sequence[Tensor]) -> Tensor:
    """What a graph over the stored weights computes of each (N, I), one after the other."""
    with _silent():
        import MNN
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.mnn"
        _save(model, file)
        with _silent():
            settings = ({"backend": "CPU", "precision": 1, "memory": 1, "numThread": 1},)
            manager = MNN.nn.create_runtime_manager(settings)
            manager.set_external(str(out / _WEIGHTS))
            names = ["x"] if inputs else []
            module = MNN.nn.load_module_from_file(str(file), names, ["y"], runtime_manager=manager)
            if not inputs:
                return _values(module.forward([])[0])
            found = []
            for each in inputs:
                x = MNN.expr.const(each.numpy(), [1, *each.shape], MNN.expr.NCHW)
                found.append(_values(module.forward([x])[0]))
            return torch.cat(found)


def _values(variable: Any) -> Tensor:
    return torch.from_numpy(variable.read().copy()).flatten()


def _embeddings(p: Placement, out: Path, offsets: dict[str, int]) -> Tensor:
    """As the runtime looks them up."""
    if p.weight.scheme is None:
        numbers = torch.frombuffer(bytearray((out / _EMBEDDINGS).read_bytes()), dtype=torch.bfloat16)
        return numbers.view(p.tensors[0].shape).float().flip(1).sum(1)
    _, codes, alpha = p.tensors
    with (out / _WEIGHTS).open("rb") as file:
        packed, alpha_OG2 = (_part(file, offsets[tensor.name], tensor) for tensor in (codes, alpha))
    bits = codes.bytes * 8 // p.weight.numel
    parts = torch.stack([(packed >> shift) & ((1 << bits) - 1) for shift in range(8 - bits, -1, -bits)], -1).float()
    zero_OG, scale_OG = alpha_OG2.view(alpha.shape).unbind(-1)
    lowest_OG = zero_OG - (1 << (bits - 1)) * scale_OG
    codes_OGS = parts.view(*scale_OG.shape, -1)
    return (codes_OGS * scale_OG[..., None] + lowest_OG[..., None]).view(p.weight.shape)


def _part(file: BinaryIO, offset: int, tensor: TensorPlan) -> Tensor:
    file.seek(offset)
    return torch.frombuffer(bytearray(file.read(tensor.bytes)), dtype=tensor.dtype)


def _agreed(weight: Weight, reads: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Rows of a weight that is stored once or twice."""
    first = reads[0][start:stop]
    if not all(torch.equal(first, other[start:stop]) for other in reads[1:]):
        raise UPQError(f"mnn: {weight.name} reads back as two different weights; nothing was kept, please report this")
    return first


EXPORTS.register("mnn")(Mnn)

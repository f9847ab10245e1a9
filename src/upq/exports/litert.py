"""LiteRT: a program for its interpreter on phones and processors, its linears' levels as integers of 4 bits.

A packed weight is (code - zero)·scale = k·d with whole numbers k (SEQ: -3, -1, 1, 3) and one d in float32 for each row:
LiteRT's INT4 and INT8 with scales along the rows (_symmetric.py).

The signatures are those of LiteRT's language models: `decode` for one token, `prefill_N` for N at once. Inputs are
`tokens` (1, T) and `input_pos` (T), int32, and keys and values of each block, `kv_cache_k_0` … (1, K, S, D), float32.
Outputs are the same keys and values with the new ones, and `logits` (1, 1, V) of the last token.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.progress import Progress
from upq.exports import _decoder as decoder
from upq.exports import _symmetric as symmetric
from upq.exports._base import EXPORTS, Options, Placement, Plan, Rows
from upq.exports._directory import DirectoryExporter
from upq.exports._mtok import chat_template
from upq.exports._source import Source, Weight
from upq.model.windows import window

_MODEL, _BUNDLE = "model.tflite", "model.litertlm"
_LARGEST = 2_000_000_000  # bytes; offsets in a flatbuffer have 31 bits
_HEADER, _HEAD = 32, 1 << 14  # where the description of a bundle begins, and where its sections begin
_LOW = -1e30  # what no score outweighs


class LiteRtOptions(Options):
    # int8: the interpreter rounds the inputs of the linears to 8 bits. float: it unpacks the weights to float32 when it
    # loads the model, and rounds nothing.
    activations: Literal["int8", "float"] = "int8"
    context: int = 1024  # tokens that the cache holds
    chunk: int = 64  # tokens of `prefill_N`
    bundle: bool = True  # model.litertlm, with tokenizer and chat template, for LiteRT-LM; else model.tflite


class LiteRt(DirectoryExporter):
    """model.litertlm or model.tflite, with the other files of a Hugging Face directory beside it."""

    Config = LiteRtOptions
    packages = ("ai-edge-litert", "litert-lm-builder")
    install = "'upq[phones]'"
    checked = "LiteRT's own schema: the constants of the stored program"
    options: LiteRtOptions

    def plan(self, source: Source) -> Plan:
        decoder.check(source)
        longest, options = source.config.max_position_embeddings, self.options
        for name, value in (("context", options.context), ("chunk", options.chunk)):
            if value < 1:
                raise UPQError(f"export litert: {name} is {value}; it is at least 1")
        if options.chunk > options.context:
            raise UPQError(f"export litert: chunk is {options.chunk}, and the cache holds {options.context} tokens")
        if options.bundle and source.path / "tokenizer.json" not in source.companions():
            raise UPQError(f"{source.path}: has no tokenizer.json, which LiteRT-LM reads; --set bundle=false")
        notes = [] if options.context <= longest else [f"context is more than the model's own {longest} tokens"]
        placements = tuple(_place(source, weight) for weight in source.weights.values())
        if (total := sum(p.bytes for p in placements)) > _LARGEST:
            raise UPQError(f"{source.path}: {total / 1e9:.1f} GB, and a file of LiteRT holds {_LARGEST / 1e9:.0f}")
        return Plan(placements=placements, notes=tuple(notes))

    def save(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        file = _File(source, self.options)
        file.add("decode", 1)
        file.add(f"prefill_{self.options.chunk}", self.options.chunk)
        (out / _MODEL).write_bytes(file.content())
        if self.options.bundle:
            _bundle(source, self.options, out)
            (out / _MODEL).unlink()
        progress.advance(len(plan.placements))

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        return {"dtype": plan.dtype_name}

    def read(self, source: Source, plan: Plan, out: Path) -> Iterator[tuple[str, Rows]]:
        stored = _stored(_program(out))
        for p in plan.placements:
            yield p.weight.name, partial(_rows, stored, p.weight)


# --- what is stored


def _place(source: Source, weight: Weight) -> Placement:
    if weight.scheme is not None and weight.scheme.groups(weight.shape[1]) > 1:
        raise UPQError(f"{source.path}: litert cannot hold scales of groups here ({weight.name}); one a row, or mnn")
    held = symmetric.carried(weight)
    if held is None:
        return Placement(weight=weight, carrier="float32", bytes=4 * weight.numel)
    looked_up = weight.name == f"{source.layout.embedding}.weight"
    multiplied = source.tied or not looked_up
    tables = weight.numel + 4 * weight.shape[0] if looked_up else 0
    products = -(-weight.numel * held.bits // 8) + 12 * weight.shape[0] if multiplied else 0  # zero points have 8 bytes
    size = tables + products + (4 * weight.shape[0] * (looked_up + multiplied) if held.shifted else 0)
    return Placement(weight=weight, carrier=f"int{held.bits}", bytes=size)


def _nibbles(codes: Tensor) -> Tensor:
    """Two integers a byte, the first in the lower half, rows without a gap."""
    flat = torch.nn.functional.pad(codes.flatten(), (0, codes.numel() % 2)).view(torch.uint8) & 15
    return flat[::2] | flat[1::2] << 4


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor of a graph; all there are have one text, and no axis for it."""

    index: int
    like: Tensor  # on torch's device for shapes alone

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.like.shape)


class _File:
    """A program under construction: graphs that share their constants."""

    def __init__(self, source: Source, options: LiteRtOptions) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema: Any = schema
        self.source, self.options = source, options
        self.held = {name: symmetric.carried(weight) for name, weight in source.weights.items()}
        self.frequencies = decoder.frequencies(source.config)
        self.buffers: list[Any] = [schema.BufferT()]  # the first is that of all values that are computed
        self.places: dict[str, int] = {}
        self.codes: dict[str, int] = {}
        self.graphs: list[Any] = []
        self.signatures: list[Any] = []

    def add(self, name: str, tokens: int) -> None:
        """The model for so many tokens at once, as a signature."""
        graph = _Graph(self, name, tokens)
        self.graphs.append(graph.finished)
        inputs, outputs = (
            [self._named(key, value) for key, value in values.items()] for values in (graph.inputs, graph.outputs)
        )
        signature = self.schema.SignatureDefT(inputs=inputs, outputs=outputs, signatureKey=name)
        signature.subgraphIndex = len(self.graphs) - 1
        self.signatures.append(signature)

    def content(self) -> bytes:
        import flatbuffers

        operators = [self._operator(name) for name in self.codes]
        model = self.schema.ModelT(
            version=3,
            operatorCodes=operators,
            subgraphs=self.graphs,
            description="upq",
            buffers=self.buffers,
            signatureDefs=self.signatures,
        )
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def buffer(self, name: str, content: Tensor) -> int:
        """A place for bytes; one for each name."""
        if name not in self.places:
            data = content.contiguous().flatten().view(torch.uint8).numpy()
            self.places[name] = len(self.buffers)
            self.buffers.append(self.schema.BufferT(data=data))
        return self.places[name]

    def code(self, operator: str) -> int:
        return self.codes.setdefault(operator, len(self.codes))

    def _operator(self, name: str) -> Any:
        code = getattr(self.schema.BuiltinOperator, name)
        version = _VERSIONS.get(name, 1)
        return self.schema.OperatorCodeT(deprecatedBuiltinCode=min(code, 127), builtinCode=code, version=version)

    def _named(self, name: str, value: _Value) -> Any:
        return self.schema.TensorMapT(name=name, tensorIndex=value.index)


_VERSIONS = {"FULLY_CONNECTED": 10, "BATCH_MATMUL": 1, "DEQUANTIZE": 6, "GATHER": 2}


class _Graph:
    """The operations of _decoder.Graph in LiteRT's schema, for so many tokens of one text."""

    def __init__(self, file: _File, name: str, tokens: int) -> None:
        self.file, self.schema, self.source = file, file.schema, file.source
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.known: dict[str, _Value] = {}
        self.inputs: dict[str, _Value] = {}
        self.outputs: dict[str, _Value] = {}
        shape, context = decoder.Shape.of(self.source.config), file.options.context
        ids = self.reshape(self._given("tokens", (1, tokens), torch.int32), (0, tokens))
        positions = self._given("input_pos", (tokens,), torch.int32)
        cache = (1, shape.kv_heads, context, shape.head_dim)
        past = [
            (self._given(f"kv_cache_k_{i}", cache), self._given(f"kv_cache_v_{i}", cache)) for i in range(shape.blocks)
        ]
        self.start = self.joined(self.constant(torch.zeros(2, dtype=torch.int32)), self.first(positions))
        self.start = self.joined(self.start, self.constant(torch.zeros(1, dtype=torch.int32)))
        nothing: Any = None
        given = decoder.Inputs(ids, nothing, positions, past)
        graph: Any = self
        made = _Decoder(graph, self.source, given).run()
        for i, pair in enumerate(made.present):
            self.outputs |= {f"kv_cache_{kind}_{i}": value for kind, value in zip("kv", pair, strict=True)}
        self.outputs["logits"] = self.reshape(made.logits_NTV, (0, 1, 1, made.logits_NTV.shape[-1]))
        self.finished = self.schema.SubGraphT(
            tensors=self.tensors,
            inputs=[value.index for value in self.inputs.values()],
            outputs=[value.index for value in self.outputs.values()],
            operators=self.operators,
            name=name,
        )

    # the operations of _decoder.Graph; a shape or an order there begins with the axis of texts, which is left out

    def frequencies(self) -> tuple[Tensor, float]:
        return self.file.frequencies

    def constant(self, value: Tensor) -> _Value:
        value = value.float() if value.is_floating_point() else value.int()
        name = f"{value.dtype}{tuple(value.shape)}{value.flatten().tolist()}"
        return self._constant(name, value)

    def vector(self, name: str) -> _Value:
        return self._dense(name)

    def embed(self, ids_NT: _Value, name: str) -> _Value:
        held, weight = self.file.held[name], self.source.weights[name]
        if held is None:
            return self._gathered(self._dense(name), ids_NT)
        scale_OG, shift_OG = symmetric.scale_shift(weight, held)
        codes = self._constant(f"{name}:looked_up", symmetric.codes(weight, held))
        x = self.to_float(self._gathered(codes, ids_NT))
        x = self.multiply(x, self._gathered(self._constant(f"{name}:scale", scale_OG), ids_NT))
        return self.add(x, self._gathered(self._constant(f"{name}:shift", shift_OG), ids_NT)) if held.shifted else x

    def linear(self, x: _Value, name: str) -> _Value:
        held, weight = self.file.held[name], self.source.weights[name]
        if held is None:
            return self._product(x, self._dense(name))
        matrix = self._packed(weight, held)
        if self.file.options.activations == "float":
            matrix = self._node("DEQUANTIZE", [matrix], matrix.like.float(), "Dequantize")
        y = self._product(x, matrix)
        if not held.shifted:
            return y
        shift_O = symmetric.scale_shift(weight, held)[1][:, 0]
        return self.add(y, self.multiply(self._reduced("SUM", x), self._constant(f"{name}:shifts", shift_O)))

    def add(self, a: _Value, b: _Value) -> _Value:
        return self._node("ADD", [a, b], a.like + b.like, "Add")

    def multiply(self, a: _Value, b: _Value) -> _Value:
        return self._node("MUL", [a, b], a.like * b.like, "Mul")

    def rsqrt(self, x: _Value) -> _Value:
        return self._node("RSQRT", [x], x.like)

    def mean(self, x: _Value) -> _Value:
        return self._reduced("MEAN", x)

    def sigmoid(self, x: _Value) -> _Value:
        return self._node("LOGISTIC", [x], x.like)

    def softmax(self, x: _Value) -> _Value:
        return self._node("SOFTMAX", [x], x.like, "Softmax", beta=1.0)

    def cos(self, x: _Value) -> _Value:
        return self._node("COS", [x], x.like, "Cos")

    def sin(self, x: _Value) -> _Value:
        return self._node("SIN", [x], x.like)

    def to_float(self, x: _Value) -> _Value:
        kind = self._kind(x.like.dtype)
        return self._node("CAST", [x], x.like.float(), "Cast", inDataType=kind, outDataType=self._kind(torch.float32))

    def reshape(self, x: _Value, shape: Sequence[int]) -> _Value:
        kept = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape[1:])]
        like = x.like.reshape(kept)
        size = self.constant(torch.tensor(list(like.shape), dtype=torch.int32))
        return self._node("RESHAPE", [x, size], like, "Reshape", newShape=list(like.shape))

    def transpose(self, x: _Value, order: Sequence[int]) -> _Value:
        turned = [axis - 1 for axis in order[1:]]
        like = x.like.permute(turned)
        return self._node("TRANSPOSE", [x, self.constant(torch.tensor(turned))], like, "Transpose")

    def concat(self, parts: Sequence[_Value], axis: int) -> _Value:
        like = torch.cat([part.like for part in parts], axis - 1)
        return self._node("CONCATENATION", list(parts), like, "Concatenation", axis=axis - 1)

    def part(self, x: _Value, start: int, stop: int) -> _Value:
        return self._slice(x, -1, start, stop)

    # what the decoder below has of LiteRT's own

    def joined(self, a: _Value, b: _Value) -> _Value:
        return self.concat([a, b], 1)

    def first(self, x: _Value) -> _Value:
        return self._slice(x, 0, 0, 1)

    def last(self, x: _Value) -> _Value:
        return self._slice(x, 0, x.shape[0] - 1, x.shape[0])

    def written(self, cache: _Value, new_KTD: _Value) -> _Value:
        """A cache (1, K, S, D) with keys or values of the tokens."""
        update = self.reshape(new_KTD, (0, 1, *new_KTD.shape))
        return self._node("DYNAMIC_UPDATE_SLICE", [cache, update, self.start], cache.like)

    def attention(self, q_KJTD: _Value, keys: _Value, values: _Value, mask: _Value) -> _Value:
        """(K, J, T, D)"""
        k, j, t, d = q_KJTD.shape
        context = keys.shape[2]
        flat = self.reshape(q_KJTD, (0, k, j * t, d))
        keys, values = (self.reshape(cache, (0, k, context, d)) for cache in (keys, values))
        scores = self._matmul(flat, keys, transposed=True)
        scores = self.add(self.reshape(scores, (0, k, j, t, context)), mask)
        read = self._matmul(self.reshape(self.softmax(scores), (0, k, j * t, context)), values, transposed=False)
        return self.reshape(read, (0, k, j, t, d))

    def bias(self, positions: _Value, seen: int | None) -> _Value:
        """0 where a query may read a key, and a large negative number elsewhere, (1, 1, T, S)."""
        context = self.file.options.context
        query = self.reshape(self.to_float(positions), (0, 1, 1, -1, 1))
        key = self.constant(torch.arange(context).float().view(1, 1, 1, -1))
        like = query.like >= key.like
        reads = self._node("GREATER_EQUAL", [query, key], like, "GreaterEqual")
        if seen is not None:
            late = self.add(key, self.constant(torch.tensor([float(seen)])))
            near = self._node("GREATER", [late, query], like, "Greater")
            reads = self._node("LOGICAL_AND", [reads, near], like, "LogicalAnd")
        choice = [reads, self.constant(torch.tensor([0.0])), self.constant(torch.tensor([_LOW]))]
        return self._node("SELECT_V2", choice, like.float(), "SelectV2")

    # tensors and operators

    def _given(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> _Value:
        self.inputs[name] = self._tensor(name, torch.empty(shape, dtype=dtype, device="meta"))
        return self.inputs[name]

    def _dense(self, name: str) -> _Value:
        return self.known[name] if name in self.known else self._constant(name, self.source.weights[name].dequantize())

    def _packed(self, weight: Weight, held: symmetric.Carried) -> _Value:
        if weight.name not in self.known:
            codes_OI, scale_O = symmetric.codes(weight, held), symmetric.scale_shift(weight, held)[0][:, 0]
            content = _nibbles(codes_OI) if held.bits == 4 else codes_OI
            zeros = torch.zeros(len(scale_O), dtype=torch.int64)
            quantization = self.schema.QuantizationParametersT(scale=scale_O.numpy(), zeroPoint=zeros.numpy())
            quantization.quantizedDimension = 0
            kind = self.schema.TensorType.INT4 if held.bits == 4 else self.schema.TensorType.INT8
            like = torch.empty(weight.shape, dtype=torch.int8, device="meta")
            place = self.file.buffer(weight.name, content)
            self.known[weight.name] = self._tensor(weight.name, like, place, kind, quantization)
        return self.known[weight.name]

    def _constant(self, name: str, value: Tensor) -> _Value:
        if name not in self.known:
            self.known[name] = self._tensor(name, value.to("meta"), self.file.buffer(name, value))
        return self.known[name]

    def _tensor(
        self, name: str, like: Tensor, place: int = 0, kind: int | None = None, quantization: Any = None
    ) -> _Value:
        kind = self._kind(like.dtype) if kind is None else kind
        shape = list(like.shape)
        tensor = self.schema.TensorT(shape=shape, type=kind, buffer=place, name=name, quantization=quantization)
        self.tensors.append(tensor)
        return _Value(len(self.tensors) - 1, like)

    def _kind(self, dtype: torch.dtype) -> int:
        kinds = self.schema.TensorType
        known = {torch.float32: kinds.FLOAT32, torch.int32: kinds.INT32, torch.int8: kinds.INT8, torch.bool: kinds.BOOL}
        found: int = known[dtype]
        return found

    def _node(
        self, operator: str, inputs: Sequence[_Value | None], like: Tensor, options: str = "", **settings: Any
    ) -> _Value:
        made = self._tensor(f"{operator}_{len(self.operators)}", like)
        node = self.schema.OperatorT(
            opcodeIndex=self.file.code(operator),
            inputs=[-1 if value is None else value.index for value in inputs],
            outputs=[made.index],
        )
        if options:
            node.builtinOptionsType = getattr(self.schema.BuiltinOptions, f"{options}Options")
            node.builtinOptions = getattr(self.schema, f"{options}OptionsT")(**settings)
        self.operators.append(node)
        return made

    def _gathered(self, table: _Value, ids: _Value) -> _Value:
        like = torch.empty(ids.shape + table.shape[1:], dtype=table.like.dtype, device="meta")
        return self._node("GATHER", [table, ids], like, "Gather", axis=0)

    def _product(self, x: _Value, matrix: _Value) -> _Value:
        like = torch.empty((*x.shape[:-1], matrix.shape[0]), device="meta")
        return self._node("FULLY_CONNECTED", [x, matrix, None], like, "FullyConnected", keepNumDims=True)

    def _matmul(self, a: _Value, b: _Value, *, transposed: bool) -> _Value:
        like = a.like @ (b.like.mT if transposed else b.like)
        return self._node("BATCH_MATMUL", [a, b], like, "BatchMatMul", adjX=False, adjY=transposed)

    def _reduced(self, operator: str, x: _Value) -> _Value:
        axis = self.constant(torch.tensor([len(x.shape) - 1]))
        return self._node(operator, [x, axis], x.like.sum(-1, keepdim=True), "Reducer", keepDims=True)

    def _slice(self, x: _Value, axis: int, start: int, stop: int) -> _Value:
        begin, size = torch.zeros(len(x.shape), dtype=torch.int32), torch.tensor(x.shape, dtype=torch.int32)
        begin[axis], size[axis] = start, stop - start
        like = x.like.narrow(axis, start, stop - start)
        return self._node("SLICE", [x, self.constant(begin), self.constant(size)], like, "Slice")


class _Decoder(decoder.Decoder[_Value]):
    """With keys and values at their places in caches, and logits of the last token."""

    def __init__(self, graph: Any, source: Source, inputs: decoder.Inputs[_Value]) -> None:
        self.lite: _Graph = graph
        super().__init__(graph, source, inputs)

    def frequencies(self) -> tuple[Tensor, float]:
        return self.lite.frequencies()

    def shown(self, x: _Value) -> _Value:
        return self.lite.last(x)

    def attend(
        self, q_NKJTD: _Value, k_NKTD: _Value, v_NKTD: _Value, block: int
    ) -> tuple[_Value, tuple[_Value, _Value]]:
        g, s = self.lite, self.shape
        past = self.inputs.past[block]
        keys, values = g.written(past[0], k_NKTD), g.written(past[1], v_NKTD)
        scaled = g.multiply(q_NKJTD, g.constant(torch.tensor([s.head_dim**-0.5])))
        read_NKJTD = g.attention(scaled, keys, values, self.mask(block))
        read_NTF = g.reshape(g.transpose(read_NKJTD, (0, 3, 1, 2, 4)), (0, 0, s.heads * s.head_dim))
        return read_NTF, (keys, values)

    def mask(self, block: int) -> _Value:
        seen = window(self.source.config, block)
        if seen not in self.masks:
            self.masks[seen] = self.lite.bias(self.inputs.positions_NT, seen)
        return self.masks[seen]


# --- the bundle


def _bundle(source: Source, options: LiteRtOptions, out: Path) -> None:
    """model.litertlm of the program and tokenizer.json in `out`."""
    from litert_lm_builder import litertlm_builder as builder
    from litert_lm_builder.runtime.proto.llm_metadata_pb2 import LlmMetadata

    about = LlmMetadata(max_num_tokens=options.context, jinja_prompt_template=_template(source))
    about.llm_model_type.generic_model.SetInParent()
    for end in source.ends():
        about.stop_tokens.add().token_ids.ids.append(end)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "about.pb"
        file.write_bytes(about.SerializeToString(deterministic=True))
        made = builder.LitertLmFileBuilder()
        made.add_llm_metadata(str(file))
        made.add_tflite_model(str(out / _MODEL), builder.TfLiteModelType.PREFILL_DECODE)
        made.add_hf_tokenizer(str(source.path / "tokenizer.json"))
        with (out / _BUNDLE).open("w+b") as bundle:
            made.build(bundle)
            _repeatable(bundle, made)


# LiteRT-LM gives a template the parts of a message where models' templates expect its text.
_TEXTS = (
    "{%- set given = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message.content is string -%}{%- set given.messages = given.messages + [message] -%}{%- else -%}"
    "{%- set text -%}{%- for part in message.content -%}{{ part.text }}{%- endfor -%}{%- endset -%}"
    "{%- set given.messages = given.messages + [{'role': message.role, 'content': text}] -%}{%- endif -%}"
    "{%- endfor -%}{%- set messages = given.messages %}"
)


def _template(source: Source) -> str:
    tokenizer = source.tokenizer()
    found = chat_template(tokenizer)
    if not found:
        return ""
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}  # nobody else sets them
    return "".join(f"{{%- set {name} = {json.dumps(text or '')} -%}}" for name, text in names.items()) + _TEXTS + found


def _repeatable(bundle: BinaryIO, made: Any) -> None:
    """The same bytes every time: the builder writes the date and a name made by chance."""
    bundle.seek(0)
    head = bundle.read(_HEAD)
    for entry in made._system_metadata:
        if entry.key in ("uuid", "creation_timestamp"):
            value = entry.value.encode()
            head = head.replace(value, b"0" * len(value))
    bundle.seek(0)
    bundle.write(head)


# --- reading back


def _program(out: Path) -> bytes:
    """The stored program, alone or within the bundle."""
    if not (out / _BUNDLE).is_file():
        return (out / _MODEL).read_bytes()
    from litert_lm_builder import litertlm_header_schema_py_generated as schema

    content = (out / _BUNDLE).read_bytes()
    sections = schema.LiteRTLMMetaData.GetRootAs(content, _HEADER).SectionMetadata()
    for section in map(sections.Objects, range(sections.ObjectsLength())):
        if section.DataType() == schema.AnySectionDataType.TFLiteModel:
            return content[section.BeginOffset() : section.EndOffset()]
    raise UPQError(f"{out / _BUNDLE}: holds no model; export again")


def _stored(program: bytes) -> dict[str, tuple[Any, Tensor]]:
    """The constants of a stored program by name: LiteRT's description of each and its bytes."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(program, 0)
    found = {}
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        for tensor in map(graph.Tensors, range(graph.TensorsLength())):
            buffer = model.Buffers(tensor.Buffer())
            if buffer.DataLength():
                found[tensor.Name().decode()] = (tensor, torch.from_numpy(buffer.DataAsNumpy().copy()))
    return found


def _rows(stored: dict[str, tuple[Any, Tensor]], weight: Weight, start: int, stop: int) -> Tensor:
    """Rows of a weight as the products and look-ups of the program have them, in float32."""
    reads = []
    if weight.name in stored:
        reads.append(_matrix(stored, weight)[start:stop])
    if f"{weight.name}:looked_up" in stored:
        codes_OI = stored[f"{weight.name}:looked_up"][1].view(torch.int8).view(weight.shape)[start:stop].float()
        scale_O1, shift_O1 = (
            stored[name][1].view(torch.float32)[start:stop, None] if name in stored else torch.zeros(1)
            for name in (f"{weight.name}:scale", f"{weight.name}:shift")
        )
        reads.append(codes_OI * scale_O1 + shift_O1)
    if not all(torch.equal(reads[0], other) for other in reads[1:]):
        raise UPQError(
            f"litert: {weight.name} reads back as two different weights; nothing was kept, please report this"
        )
    return reads[0]


def _matrix(stored: dict[str, tuple[Any, Tensor]], weight: Weight) -> Tensor:
    tensor, data = stored[weight.name]
    quantization = tensor.Quantization()
    if quantization is None or not quantization.ScaleLength():
        return data.view(torch.float32).view(weight.shape)
    from ai_edge_litert import schema_py_generated as schema

    if tensor.Type() == schema.TensorType.INT4:
        signed = torch.stack([data << 4, data & 0xF0], -1).view(torch.int8) >> 4
        codes_OI = signed.flatten()[: weight.numel].view(weight.shape)
    else:
        codes_OI = data.view(torch.int8).view(weight.shape)
    exact = codes_OI.float() * torch.from_numpy(quantization.ScaleAsNumpy().copy())[:, None]
    shift = stored.get(f"{weight.name}:shifts")
    return exact if shift is None else exact + shift[1].view(torch.float32)[:, None]


EXPORTS.register("litert")(LiteRt)

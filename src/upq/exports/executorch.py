"""ExecuTorch: a program for phones and processors whose linears run in XNNPACK, their levels as integers of 4 bits.

A packed weight is (code - zero)·scale = k·d with whole numbers k (SEQ: -3, -1, 1, 3) and one d in float32 for each row.
XNNPACK has such integers in 4 and 8 bits, two a byte and one. Scales of groups are bfloat16 there, and only where the
inputs are rounded to 8 bits. Where k needs more than 8 bits, codes are stored around their middle, and the program adds
the sum of the inputs times what the middle is away from zero.

The program is what ExecuTorch's own runner of language models reads: `forward(tokens (1, T), input_pos (1,))` gives the
logits of the last token, (1, V); keys and values stay in the program; and methods such as `get_max_seq_len` and
`get_eos_ids` say what it is made for.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from upq.core.errors import UPQError
from upq.core.precision import dtype_name
from upq.core.progress import Progress
from upq.exports import _decoder as decoder
from upq.exports import _integers as integers
from upq.exports import _symmetric as symmetric
from upq.exports._base import EXPORTS, Options, Placement, Plan, Rows
from upq.exports._directory import DirectoryExporter
from upq.exports._source import Source, Weight
from upq.model.windows import window

_PROGRAM = "model.pte"
_INT8 = (-128, 127)
_BLOCK = 32  # XNNPACK's groups are multiples of it


class ExecuTorchOptions(Options):
    # int8: XNNPACK rounds the inputs of the linears to 8 bits, one scale a token. float: it rounds nothing.
    activations: Literal["int8", "float"] = "int8"
    context: int = 2048  # tokens that the cache holds; it is allocated whole
    chunk: int = 128  # tokens in one call; the runner cuts a prompt into such parts


class ExecuTorch(DirectoryExporter):
    """model.pte, with the tokenizer and the other files of a Hugging Face directory beside it."""

    Config = ExecuTorchOptions
    packages = ("executorch",)
    install = "'upq[phones]'"
    checked = "ExecuTorch's reader of the stored program: constants of XNNPACK's products and of the embedding"
    options: ExecuTorchOptions

    def plan(self, source: Source) -> Plan:
        decoder.check(source)
        longest, options = source.config.max_position_embeddings, self.options
        for name, value in (("context", options.context), ("chunk", options.chunk)):
            if value < 2:
                raise UPQError(f"export executorch: {name} is {value}; it is at least 2")
        notes = [] if options.context <= longest else [f"context is more than the model's own {longest} tokens"]
        placements = tuple(self._place(source, weight) for weight in source.weights.values())
        return Plan(placements=placements, notes=tuple(notes))

    def save(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        with _quiet():
            program = _lowered(_Model(source, self.options))
        with (out / _PROGRAM).open("wb") as file:
            program.write_to_file(file)
        progress.advance(len(plan.placements))

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        return {"dtype": plan.dtype_name}

    def read(self, source: Source, plan: Plan, out: Path) -> Iterator[tuple[str, Rows]]:
        with _quiet():
            stored = _Stored(out / _PROGRAM)
        order = _Order(source)
        if (len(order.linears), len(order.vectors)) != (len(stored.products), len(stored.vectors)):
            raise UPQError(f"{out.name}: has other products or vectors than were written; please report this")
        products = dict(zip(order.linears, stored.products, strict=True))
        vectors = dict(zip(order.vectors, stored.vectors, strict=True))
        for p in plan.placements:
            name, shifted, reads = p.weight.name, _shifted(p.weight), list[Rows]()
            if name in products:
                rows = products[name]
                reads.append(partial(_shift, rows, vectors[f"{name}_shift"]) if shifted else rows)
            if name in vectors:
                reads.append(partial(_part, vectors[name]))
            if name == order.embedding:
                reads.append(partial(_table, stored.tables, shifted))
            yield name, partial(_agreed, name, reads)

    def _place(self, source: Source, weight: Weight) -> Placement:
        looked_up = weight.name == f"{source.layout.embedding}.weight"
        multiplied = len(weight.shape) == 2 and (source.tied or not looked_up)
        carried = _held(weight)
        if weight.scheme is None or carried is None:
            dtype = decoder.dense_dtype(weight)  # of a table; XNNPACK multiplies in float32
            kinds = ([dtype] if looked_up else []) + ([torch.float32] if multiplied or not looked_up else [])
            carrier = ", ".join(dict.fromkeys(map(dtype_name, kinds)))
            return Placement(weight=weight, carrier=carrier, bytes=sum(weight.numel * kind.itemsize for kind in kinds))
        groups, loss = weight.scheme.groups(weight.shape[1]), None
        if groups > 1:
            fits = integers.misfit(weight, torch.bfloat16) is None
            loss = None if fits else "XNNPACK's scales of groups are bfloat16"
            if (size := weight.scheme.group_size) % _BLOCK:
                raise UPQError(
                    f"{source.path}: executorch cannot hold groups of {size}: XNNPACK has multiples of {_BLOCK}"
                )
            if self.options.activations == "float":
                raise UPQError(
                    f"{source.path}: executorch cannot hold groups with float activations: XNNPACK has none; "
                    "--set activations=int8"
                )
        scales = weight.shape[0] * groups * (4 if groups == 1 else 2)
        shifts = 4 * weight.shape[0] if carried.shifted else 0
        size = (weight.numel if looked_up else 0) + (-(-weight.numel * carried.bits // 8) if multiplied else 0)
        size += (scales + shifts) * (looked_up + multiplied)
        return Placement(weight=weight, carrier=f"int{carried.bits}", bytes=size, loss=loss)


def _held(weight: Weight) -> symmetric.Carried | None:
    """None for what stays dense: XNNPACK has groups of integers in 4 bits alone."""
    found, scheme = symmetric.carried(weight), weight.scheme
    grouped = scheme is not None and scheme.groups(weight.shape[1]) > 1
    return None if grouped and found is not None and found.bits == 8 else found


def _shifted(weight: Weight) -> bool:
    carried = _held(weight)
    return carried is not None and carried.shifted


# --- the program


class _Model(nn.Module):
    """The decoder with its weights as buffers, and the operations of _decoder.Graph on tensors."""

    def __init__(self, source: Source, options: ExecuTorchOptions) -> None:
        super().__init__()
        self.source, self.options = source, options
        self.carried = {name: _held(weight) for name, weight in source.weights.items()}
        self.sized = decoder.Shape.of(source.config)
        frequency_D, self.scaling = decoder.frequencies(source.config)
        self.register_buffer("frequency", frequency_D)
        for weight in source.weights.values():
            self._keep(weight)
        shape = self.sized
        cache = (1, options.context, shape.kv_heads, shape.head_dim)
        for i in range(shape.blocks):
            for kind in ("keys", "values"):
                self.register_buffer(f"{kind}_{i}", torch.zeros(cache), persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        start: Any = input_pos[0].item()
        check: Any = torch._check  # what is known of a number when the program is traced
        check(start >= 0)
        check(start + tokens.shape[1] <= self.options.context)
        positions = (torch.arange(tokens.shape[1]) + input_pos)[None]
        self.start, self.positions = start, positions
        inputs = replace(_no_inputs(self.source), ids_NT=tokens, positions_NT=positions)
        graph: Any = self
        logits_NTV: Tensor = _Decoder(graph, self.source, inputs).run().logits_NTV
        return logits_NTV[:, -1]

    def constant(self, value: Tensor) -> Any:
        return value.item() if value.numel() == 1 else value

    def frequencies(self) -> tuple[Any, float]:
        return self.frequency, self.scaling

    def vector(self, name: str) -> Tensor:
        return self._buffer(name)

    def embed(self, ids_NT: Tensor, name: str) -> Tensor:
        carried = self.carried[name]
        if carried is None:
            return nn.functional.embedding(ids_NT, self._buffer(name, "table")).float()
        codes, scales = (nn.functional.embedding(ids_NT, self._buffer(name, part)) for part in ("looked_up", "scales"))
        scale, shift = scales.chunk(2, -1)
        if scale.shape[-1] == 1:
            x = codes.float() * scale
            return x + shift if carried.shifted else x
        groups = (*scale.shape, codes.shape[-1] // scale.shape[-1])
        return (codes.float().reshape(groups) * scale[..., None]).reshape(codes.shape)

    def linear(self, x: Tensor, name: str) -> Tensor:
        carried, operations = self.carried[name], torch.ops.quantized_decomposed
        if carried is None:
            return nn.functional.linear(x, self._buffer(name))
        read = x
        if self.options.activations == "int8":
            scale, zero = operations.choose_qparams_per_token_asymmetric(x, torch.int8)
            read = operations.quantize_per_token(x, scale, zero, *_INT8, torch.int8)
            read = operations.dequantize_per_token(read, scale, zero, *_INT8, torch.int8, torch.float32)
        codes, scale, zero = (self._buffer(name, part) for part in ("codes", "scale", "zero"))
        if scale.dim() == 1:
            weight = operations.dequantize_per_channel(codes, scale, zero, 0, *carried.limits, torch.int8)
        else:
            size = codes.shape[1] // scale.shape[1]
            weight = operations.dequantize_per_channel_group(
                codes, scale, zero, *carried.limits, torch.int8, size, torch.float32
            )
        y = nn.functional.linear(read, weight)
        return y + x.sum(-1, keepdim=True) * self._buffer(name, "shift") if carried.shifted else y

    def add(self, a: Tensor, b: Tensor | float) -> Tensor:
        return torch.add(a, b)

    def multiply(self, a: Tensor, b: Tensor | float) -> Tensor:
        return torch.mul(a, b)

    def rsqrt(self, x: Tensor) -> Tensor:
        return x.rsqrt()

    def mean(self, x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    def sigmoid(self, x: Tensor) -> Tensor:
        return x.sigmoid()

    def cos(self, x: Tensor) -> Tensor:
        return x.cos()

    def sin(self, x: Tensor) -> Tensor:
        return x.sin()

    def to_float(self, x: Tensor) -> Tensor:
        return x.float()

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        return x.permute(list(order))

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(parts), axis)

    def part(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[..., start:stop]

    def last(self, x: Tensor) -> Tensor:
        return x[:, -1:]

    def attention(self, q_NKJTD: Tensor, k_NKTD: Tensor, v_NKTD: Tensor, block: int) -> Tensor:
        """(1, T, F), by ExecuTorch's own attention over the cache."""
        s, operations = self.sized, torch.ops.llama
        q_NTHD = q_NKJTD.permute(0, 3, 1, 2, 4).reshape(1, -1, s.heads, s.head_dim)
        keys, values = getattr(self, f"keys_{block}"), getattr(self, f"values_{block}")
        operations.update_cache(k_NKTD.permute(0, 2, 1, 3), keys, self.start)
        operations.update_cache(v_NKTD.permute(0, 2, 1, 3), values, self.start)
        seen = window(self.source.config, block)
        mask_TS = None if seen is None else self._near(seen)
        read: Tensor = operations.custom_sdpa(q_NTHD, keys, values, self.start, mask_TS, 0.0, mask_TS is None)
        return read.reshape(1, -1, s.heads * s.head_dim)

    def _near(self, seen: int) -> Tensor:
        """0 for the last `seen` keys up to each query, else minus infinity, (T, context)."""
        query_T1, key_S = self.positions[0][:, None], torch.arange(self.options.context)
        reads = torch.logical_and(key_S <= query_T1, key_S > query_T1 - seen)
        return torch.where(reads, 0.0, float("-inf"))

    def _keep(self, weight: Weight) -> None:
        """Register what the program has of a weight."""
        carried, name = self.carried[weight.name], weight.name
        looked_up = name == f"{self.source.layout.embedding}.weight"
        multiplied = self.source.tied or not looked_up
        if carried is None:
            if looked_up:
                self._register(name, weight.dequantize().to(decoder.dense_dtype(weight)), "table")
            if multiplied:
                self._register(name, weight.dequantize())
            return
        codes_OI = symmetric.codes(weight, carried)
        scale_OG, shift_OG = symmetric.scale_shift(weight, carried)
        grouped = scale_OG.shape[1] > 1
        scale_OG = scale_OG.bfloat16().float() if grouped else scale_OG
        if looked_up:
            self._register(name, codes_OI, "looked_up")
            self._register(name, torch.cat([scale_OG, shift_OG], 1), "scales")
        if multiplied:
            self._register(name, codes_OI, "codes")
            scale = scale_OG if grouped else scale_OG[:, 0]
            self._register(name, scale, "scale")
            self._register(name, torch.zeros(scale.shape, dtype=torch.int32 if grouped else torch.int64), "zero")
            if carried.shifted:
                self._register(name, shift_OG[:, 0], "shift")

    def _register(self, name: str, value: Tensor, part: str = "") -> None:
        self.register_buffer(_plain(name, part), value.contiguous())

    def _buffer(self, name: str, part: str = "") -> Tensor:
        return self.get_buffer(_plain(name, part))


def _plain(name: str, part: str = "") -> str:
    """A name that a buffer may have."""
    return "_".join(["weight", *name.split("."), *([part] if part else [])])


class _Decoder(decoder.Decoder[Any]):
    """With ExecuTorch's attention, and logits of the last token."""

    def frequencies(self) -> tuple[Any, float]:
        graph: Any = self.g
        found: tuple[Any, float] = graph.frequencies()
        return found

    def shown(self, x: Any) -> Any:
        graph: Any = self.g
        return graph.last(x)

    def attend(self, q_NKJTD: Any, k_NKTD: Any, v_NKTD: Any, block: int) -> tuple[Any, tuple[Any, Any]]:
        graph: Any = self.g
        return graph.attention(q_NKJTD, k_NKTD, v_NKTD, block), (k_NKTD, v_NKTD)


class _Order:
    """A graph that computes nothing and notes which weights are used, in the order of the program."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.linears: list[str] = []
        self.vectors: list[str] = []  # of several numbers; "": no weight
        self.embedding = ""
        graph: Any = self
        _Decoder(graph, source, _no_inputs(source)).run()

    def __getattr__(self, operation: str) -> Any:
        return lambda *values: None

    def frequencies(self) -> tuple[Tensor, float]:
        return torch.zeros(2), 1.0

    def constant(self, value: Tensor) -> None:
        if value.numel() > 1:
            self.vectors.append("")

    def vector(self, name: str) -> None:
        self.vectors.append(name)

    def embed(self, ids_NT: None, name: str) -> None:
        self.embedding = name

    def linear(self, x: None, name: str) -> None:
        self.linears.append(name)
        if _shifted(self.source.weights[name]):
            self.vectors.append(f"{name}_shift")


def _no_inputs(source: Source) -> decoder.Inputs[Any]:
    return decoder.Inputs(None, None, None, [(None, None)] * decoder.Shape.of(source.config).blocks)


# --- ExecuTorch's library


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that ExecuTorch 1.5 has about its own calls of torch 2.13."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _lowered(model: _Model) -> Any:
    """ExecuTorch's program."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
    from executorch.extension.llm.custom_ops import custom_ops

    assert custom_ops is not None  # imported for the operations that it registers: the cache and attention
    chunk = min(model.options.chunk, model.options.context)
    given = (torch.zeros(1, chunk, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    shapes = ({1: torch.export.Dim("tokens", min=1, max=chunk)}, None)
    with torch.no_grad():
        traced = torch.export.export(model.eval(), given, dynamic_shapes=shapes, strict=False)
    edge = to_edge_transform_and_lower(
        traced,
        partitioner=[XnnpackPartitioner(configs=_partitions())],
        constant_methods=_facts(model),
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    return edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )


def _partitions() -> list[Any]:
    """What XNNPACK computes: as ExecuTorch has it, and products of float32 with packed weights.

    XNNPACK has the kernels for these. ExecuTorch's own partitions ask for inputs of 8 bits wherever a weight is packed.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant, tag_as_implicit_q_dq

    class WeightsAlone(LinearConfig):  # type: ignore[misc]
        def _detect_precision(self, node: Any) -> Any:
            found = super()._detect_precision(node)
            return ConfigPrecisionType.FP32 if found == ConfigPrecisionType.STATIC_QUANT else found

        def _get_weight_deps(self, node: Any, ep: Any, precision: Any) -> Any:
            weight = node.all_input_nodes[self.weight_idx]
            if precision == ConfigPrecisionType.FP32 and is_dequant(weight):
                tag_as_implicit_q_dq(weight)
                return True, [weight, *weight.all_input_nodes]
            return super()._get_weight_deps(node, ep, precision)

    return [WeightsAlone if config is LinearConfig else config for config in ALL_PARTITIONER_CONFIGS]


def _facts(model: _Model) -> dict[str, Any]:
    """Methods by which a runner of language models asks what the program is."""
    config, options, ends = model.source.config, model.options, model.source.ends()
    found: dict[str, Any] = {
        "get_max_seq_len": min(options.chunk, options.context),
        "get_max_context_len": options.context,
        "get_vocab_size": config.vocab_size,
        "get_n_layers": model.sized.blocks,
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
    }
    if isinstance(config.bos_token_id, int):
        found["get_bos_id"] = config.bos_token_id
    return found | ({"get_eos_ids": ends} if ends else {})


class _Stored:
    """A stored program, by ExecuTorch's own reader."""

    def __init__(self, file: Path) -> None:
        from executorch.exir._serialize._program import deserialize_pte_binary

        pte = deserialize_pte_binary(file.read_bytes())
        self.program, self.named = pte.program, pte.named_data
        (self.method,) = (plan for plan in self.program.execution_plan if plan.name == "forward")
        # The numbers of nodes for debuggers count operations as the program was traced: partitions have another order.
        nodes = sorted(self._nodes(), key=lambda node: node.number)
        products = (node for node in nodes if node.kind == "XNNFullyConnected")
        self.products = [self._product(node) for node in products]
        self.vectors = [found for node in nodes if (found := self._vector(node)) is not None]
        self.tables = list(self._tables())

    def _nodes(self) -> Iterator[_Node]:
        """What XNNPACK computes."""
        for call in self._calls("DelegateCall"):
            delegate = self.method.delegates[call.delegate_index]
            graph = _xnnpack(self.program.backend_delegate_data[delegate.processed.index].data)
            values = {}
            for value in graph["xvalues"]:
                content = value["xvalue_union"]
                values[content.get("tensor_value", content)["id_out"]] = content
            keys = [constant.get("named_key", "") for constant in graph["constant_data"]]
            for node in graph["xnodes"]:
                yield _Node(
                    node["xnode_union_type"], node["debug_handle"], node["xnode_union"], values, keys, call.args
                )

    def _calls(self, kind: str) -> Iterator[Any]:
        calls = (instruction.instr_args for instruction in self.method.chains[0].instructions)
        return (call for call in calls if type(call).__name__ == kind)

    def _product(self, node: _Node) -> Rows:
        content = node.values[node.ids["filter_id"]]
        tensor = content.get("tensor_value", content)
        rows, columns = tensor["dims"]
        data = self._data(node.keys[tensor["constant_buffer_idx"]])
        kind = tensor["datatype"]
        if kind == "xnn_datatype_fp32":
            return partial(_part, data.view(torch.float32).view(rows, columns))
        scaled = content["quant_params"]
        dtype = torch.bfloat16 if kind == "xnn_datatype_qbint4" else torch.float32
        scale_OG = self._data(node.keys[scaled["scale_buffer_idx"]]).view(dtype).view(rows, -1)
        return partial(_scaled, data.view(rows, -1), scale_OG, columns, kind == "xnn_datatype_qcint8")

    def _vector(self, node: _Node) -> Tensor | None:
        """The constant numbers that something is multiplied with or added to."""
        if node.kind not in ("XNNMultiply", "XNNAdd"):
            return None
        for side in ("input1_id", "input2_id"):
            value = node.values[node.ids[side]]
            given = value["external_id"] < len(node.arguments)  # constants that are no weights stay outside of XNNPACK
            found = self._constant(node.arguments[value["external_id"]]) if given else None
            if found is not None and found.numel() > 1:
                return found
        return None

    def _data(self, key: str) -> Tensor:
        content = self.named.buffers[self.named.pte_data[key].buffer_index]
        return torch.frombuffer(bytearray(bytes(content)), dtype=torch.uint8)

    def _tables(self) -> Iterator[Tensor]:
        """What rows are looked up in."""
        for call in self._calls("KernelCall"):
            if self.method.operators[call.op_index].name == "aten::embedding":
                found = self._constant(call.args[0])
                assert found is not None
                yield found

    def _constant(self, index: int) -> Tensor | None:
        """A value of the program that is written in it."""
        tensor = self.method.values[index].val
        if type(tensor).__name__ != "Tensor" or not tensor.data_buffer_idx or tensor.allocation_info is not None:
            return None
        kinds = {"CHAR": torch.int8, "FLOAT": torch.float32, "HALF": torch.float16, "BFLOAT16": torch.bfloat16}
        content = bytearray(self.program.constant_buffer[tensor.data_buffer_idx].storage)
        numbers = torch.frombuffer(content, dtype=kinds[tensor.scalar_type.name])
        return numbers[: torch.Size(tensor.sizes).numel()].view(tensor.sizes)  # without padding


@dataclass(frozen=True, slots=True)
class _Node:
    """An operation of XNNPACK, with its graph's values, the keys of its constants, and what it is called with."""

    kind: str
    number: int
    ids: dict[str, Any]
    values: dict[int, dict[str, Any]]
    keys: list[str]
    arguments: Sequence[int]


def _xnnpack(blob: bytes) -> dict[str, Any]:
    """XNNPACK's graph in a delegate's bytes."""
    import executorch.backends.xnnpack.serialization as serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.bin"
        file.write_bytes(blob[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _flatc_decompile(folder, str(Path(next(iter(serialization.__path__))) / "schema.fbs"), str(file))
        found: dict[str, Any] = json.loads(file.with_suffix(".json").read_text())
        return found


def _part(numbers: Tensor, start: int, stop: int) -> Tensor:
    return numbers[start:stop]


def _scaled(data_OB: Tensor, scale_OG: Tensor, columns: int, bytewise: bool, start: int, stop: int) -> Tensor:
    """Rows of integers times their scales; two integers a byte, plus 8, the first in the lower half."""
    data_OB = data_OB[start:stop]
    if bytewise:
        codes_OI = data_OB.view(torch.int8)
    else:
        codes_OI = torch.stack([data_OB & 15, data_OB >> 4], -1).flatten(1)[:, :columns].to(torch.int8) - 8
    scale_OG = scale_OG[start:stop].float()
    return (codes_OI.float().view(*scale_OG.shape, -1) * scale_OG[..., None]).view(codes_OI.shape)


def _shift(rows: Rows, shift_O: Tensor, start: int, stop: int) -> Tensor:
    return rows(start, stop) + shift_O[start:stop, None]


def _table(tables: Sequence[Tensor], shifted: bool, start: int, stop: int) -> Tensor:
    """Rows as the program looks them up."""
    first = tables[0][start:stop].float()
    if len(tables) == 1:
        return first
    scale_OG, shift_OG = tables[1][start:stop].chunk(2, 1)
    scaled = (first.view(*scale_OG.shape, -1) * scale_OG[..., None]).view(first.shape)
    return scaled + shift_OG if shifted else scaled


def _agreed(name: str, reads: Sequence[Rows], start: int, stop: int) -> Tensor:
    """Rows of a weight that is stored once or twice."""
    first, *others = (rows(start, stop) for rows in reads)
    if not all(torch.equal(first, other) for other in others):
        raise UPQError(f"executorch: {name} reads back as two different weights; nothing was kept, please report this")
    return first


EXPORTS.register("executorch")(ExecuTorch)

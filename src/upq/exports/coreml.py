"""Core ML: a stateful program for iPhones and Macs (iOS 18, macOS 15), its linears as 2-bit look-up tables.

A packed weight is a table of the integers k and a scale d for each row or group: (code - zero)·scale = k·d, where k is
-3, -1, 1, 3 for SEQ. Codes stay packed in the file, and the tables hold every level exactly. The program computes in
float16 but for norms, and for numbers of the model that float16 does not hold.

Inputs, outputs and states have the names that swift-transformers and Apple's own conversions use: `inputIds` (1, T),
`causalMask` (1, 1, T, S) with 0 or a large negative number, `keyCache` and `valueCache`, `logits`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.precision import dtype_name
from upq.core.progress import Progress
from upq.exports import _decoder as decoder
from upq.exports import _integers as integers
from upq.exports._base import EXPORTS, Options, Placement, Plan, Rows
from upq.exports._directory import DirectoryExporter
from upq.exports._source import Source, Weight
from upq.exports.dense import holds
from upq.grids import GRIDS
from upq.model.windows import window

_PACKAGE = "model.mlpackage"
_CACHES = ("keyCache", "valueCache")
_LOW = -30_000.0  # what float16 holds, and no score outweighs
_SPECIFICATION = Path("com.apple.CoreML", "model.mlmodel")


class CoreMlOptions(Options):
    context: int = 2048  # tokens that the cache holds; it is allocated whole


class CoreMl(DirectoryExporter):
    """model.mlpackage, with the tokenizer and the other files of a Hugging Face directory beside it."""

    Config = CoreMlOptions
    packages = ("coremltools",)
    install = "'upq[phones]'"
    checked = "coremltools' reader of the saved program: tables, codes and scales"
    options: CoreMlOptions

    def plan(self, source: Source) -> Plan:
        decoder.check(source)
        longest = source.config.max_position_embeddings
        if self.options.context < 1:
            raise UPQError(f"export coreml: context is {self.options.context}; it is at least 1")
        notes = ["not run on a device; the saved program's arithmetic was followed in float32 by the tests"]
        if self.options.context > longest:
            notes.append(f"context is more than the model's own {longest} tokens")
        placements = tuple(_place(source, weight) for weight in source.weights.values())
        return Plan(placements=placements, notes=tuple(notes))

    def save(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        import coremltools as ct
        import numpy as np

        tokens, seen = (ct.RangeDim(lower_bound=1, upper_bound=self.options.context, default=1) for _ in range(2))
        inputs = [
            ct.TensorType(name="inputIds", shape=(1, tokens), dtype=np.int32),
            ct.TensorType(name="causalMask", shape=(1, 1, tokens, seen), dtype=np.float16),
        ]
        # No pass may change a constant: everything is as written here.
        model = ct.convert(
            _program(source, self.options.context),
            inputs=inputs,
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            pass_pipeline=ct.PassPipeline.EMPTY,
        )
        model.save(str(out / _PACKAGE))
        _repeatable(out / _PACKAGE)
        progress.advance(len(plan.placements))

    def config(self, source: Source, plan: Plan) -> dict[str, Any]:
        return {"dtype": plan.dtype_name}

    def read(self, source: Source, plan: Plan, out: Path) -> Iterator[tuple[str, Rows]]:
        values = {operation.name: operation for operation in program(out).functions["main"].operations}
        for p in plan.placements:
            yield p.weight.name, partial(_rows, values, p.weight)


def program(out: Path) -> Any:
    """The saved program, by coremltools' own reader."""
    from coremltools.converters.mil.frontend.milproto import load
    from coremltools.models.utils import load_spec

    folder = out / _PACKAGE
    spec = load_spec(str(folder))
    return load.load(spec, spec.specificationVersion, str(folder / "Data" / "com.apple.CoreML" / "weights"))


def _repeatable(folder: Path) -> None:
    """The same bytes every time: coremltools writes the date, and names parts of a package by chance."""
    from coremltools.models.utils import load_spec

    spec = load_spec(str(folder))
    spec.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    (folder / "Data" / _SPECIFICATION).write_bytes(spec.SerializeToString(deterministic=True))
    manifest = folder / "Manifest.json"
    content = manifest.read_text()
    for name, part in json.loads(content)["itemInfoEntries"].items():
        content = content.replace(name, str(uuid.uuid5(uuid.NAMESPACE_URL, part["path"])))
    parts = json.loads(content)
    manifest.write_text(json.dumps(parts, indent=4, sort_keys=True) + "\n")


# --- weights


def _place(source: Source, weight: Weight) -> Placement:
    scheme = weight.scheme
    if scheme is None:
        dtype = torch.float16 if holds(weight, torch.float16) else torch.float32
        return Placement(weight=weight, carrier=dtype_name(dtype), bytes=weight.numel * dtype.itemsize)
    dtype = _scale_dtype(weight)
    groups = weight.shape[0] * scheme.groups(weight.shape[1])
    tables = 1 if GRIDS.get(scheme.grid).zero(scheme) is not None else groups
    size = -(-weight.numel * scheme.bits // 8) + groups * dtype.itemsize + tables * scheme.levels
    loss = integers.misfit(weight, torch.float32)
    if loss is None and integers.bits(weight) > 8:
        loss = "a table has integers of 8 bits, and this one would have more"
    if loss is None and scheme.bits in (5, 7):
        loss = f"there are no tables of {scheme.bits} bits"
    return Placement(weight=weight, carrier=f"table of {scheme.levels}", bytes=size, loss=loss)


def _scale_dtype(weight: Weight) -> torch.dtype:
    """float16 where that holds every d, else float32."""
    return torch.float16 if integers.misfit(weight, torch.float16) is None else torch.float32


def _rows(values: dict[str, Any], weight: Weight, start: int, stop: int) -> Tensor:
    """Rows of a weight as the program's tables give them, in float32."""
    name = _plain(weight.name)
    if weight.scheme is None:
        return torch.from_numpy(values[name].outputs[0].val[start:stop].copy()).float()
    table, scaled = values[f"{name}_codes"], values[name]
    codes_OI = torch.from_numpy(table.indices.val[start:stop].astype("int64"))
    lut_OGL = torch.from_numpy(table.lut.val[..., 0].astype("float32"))
    scale_OG = torch.from_numpy(scaled.scale.val[start:stop].astype("float32"))
    groups = scale_OG.shape[1]
    codes_OGS = codes_OI.view(stop - start, groups, -1)
    lut_OGL = lut_OGL[start:stop] if lut_OGL.shape[0] > 1 else lut_OGL.expand(stop - start, groups, -1)
    return (lut_OGL.gather(-1, codes_OGS) * scale_OG[..., None]).view(codes_OI.shape)


def _plain(name: str) -> str:
    """A name that a program may have."""
    return name.replace(".", "_")


# --- the program


def _program(source: Source, context: int) -> Any:
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import get_new_symbol, types

    shape = decoder.Shape.of(source.config)
    tokens, seen = get_new_symbol("T"), get_new_symbol("S")
    cache = (shape.blocks, 1, shape.kv_heads, context, shape.head_dim)
    inputs = [
        mb.TensorSpec((1, tokens), dtype=types.int32),
        mb.TensorSpec((1, 1, tokens, seen), dtype=types.fp16),
        *(mb.StateTensorSpec(cache, dtype=types.fp16) for _ in _CACHES),
    ]

    def main(inputIds: Any, causalMask: Any, keyCache: Any, valueCache: Any) -> Any:  # the inputs' own names
        graph = _Mil(source)
        last, first = graph.lengths(inputIds, causalMask)
        positions = mb.expand_dims(x=mb.range_1d(start=first, end=last, step=1), axes=[0])
        given = decoder.Inputs(inputIds, causalMask, positions, [(keyCache, valueCache)] * shape.blocks)
        made = _MilDecoder(graph, source, given, first, last).run()
        return mb.cast(x=made.logits_NTV, dtype="fp16", name="logits")

    return mb.program(input_specs=inputs, opset_version=ct.target.iOS18)(main)


class _Mil:
    """The operations of _decoder.Graph in Core ML's intermediate language, in float16 where nothing else is said."""

    def __init__(self, source: Source) -> None:
        from coremltools.converters.mil import Builder

        self.mb, self.source = Builder, source
        self.made: dict[str, Any] = {}

    def lengths(self, ids: Any, mask: Any) -> tuple[Any, Any]:
        """How many tokens there are with these, and before them."""
        mb = self.mb
        last = mb.gather(x=mb.shape(x=mask), indices=3, axis=0)
        new = mb.gather(x=mb.shape(x=ids), indices=1, axis=0)
        return last, mb.sub(x=last, y=new)

    def constant(self, value: Tensor) -> Any:
        return value.numpy()

    def vector(self, name: str) -> Any:
        return self.half(self._dense(name))

    def embed(self, ids_NT: Any, name: str) -> Any:
        return self.half(self.mb.gather(x=self._matrix(name), indices=ids_NT, axis=0))

    def linear(self, x: Any, name: str) -> Any:
        weight = self._matrix(name)
        wide = self._wide(weight)
        return self.half(self.mb.linear(x=self.to_float(x) if wide else x, weight=weight))

    def norm(self, x: Any, name: str, eps: float) -> Any:
        """In float32: squares of massive activations are more than float16 holds."""
        mb = self.mb
        wide = self.to_float(x)
        mean = mb.reduce_mean(x=mb.mul(x=wide, y=wide), axes=[-1], keep_dims=True)
        scaled = mb.mul(x=wide, y=mb.rsqrt(x=mean, epsilon=float(eps)))
        return self.half(mb.mul(x=scaled, y=self.to_float(self._dense(name))))

    def add(self, a: Any, b: Any) -> Any:
        return self.mb.add(**self._pair(a, b))

    def multiply(self, a: Any, b: Any) -> Any:
        return self.mb.mul(**self._pair(a, b))

    def matmul(self, a: Any, b: Any) -> Any:
        return self.mb.matmul(x=a, y=b)

    def sigmoid(self, x: Any) -> Any:
        return self.mb.sigmoid(x=x)

    def softmax(self, x: Any) -> Any:
        return self.mb.softmax(x=x, axis=-1)

    def cos(self, x: Any) -> Any:
        return self.mb.cos(x=x)

    def sin(self, x: Any) -> Any:
        return self.mb.sin(x=x)

    def to_float(self, x: Any) -> Any:
        return self.mb.cast(x=x, dtype="fp32")

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        kept = [1 if size == 0 and axis == 0 else -1 if size == 0 else size for axis, size in enumerate(shape)]
        return self.mb.reshape(x=x, shape=kept)  # there is one text

    def transpose(self, x: Any, order: Sequence[int]) -> Any:
        return self.mb.transpose(x=x, perm=list(order))

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        return self.mb.concat(values=list(parts), axis=axis)

    def part(self, x: Any, start: int, stop: int) -> Any:
        rank = len(x.shape)
        begin, end = [0] * (rank - 1) + [start], [0] * (rank - 1) + [stop]
        return self.mb.slice_by_index(
            x=x, begin=begin, end=end, begin_mask=[True] * (rank - 1) + [False], end_mask=[True] * (rank - 1) + [False]
        )

    def recalled(self, state: Any, new_NKTD: Any, block: int, first: Any, last: Any) -> Any:
        """Keys or values of a block, old and new, (1, K, S, D); the new ones are in the state from now on."""
        mb = self.mb
        begin = mb.concat(values=[[block], [0], [0], mb.expand_dims(x=first, axes=[0]), [0]], axis=0)
        end = mb.concat(values=[[block + 1], [0], [0], mb.expand_dims(x=last, axes=[0]), [0]], axis=0)
        whole = [False, True, True, False, True]  # axes from end to end
        update = mb.expand_dims(x=new_NKTD, axes=[0])
        held = mb.slice_update(
            x=mb.read_state(input=state), update=update, begin=begin, end=end, begin_mask=whole, end_mask=whole
        )
        written = mb.coreml_update_state(state=state, value=held, name=f"{state.name}_{block}")
        start = mb.concat(values=[[block], [0], [0], [0], [0]], axis=0)
        seen = mb.slice_by_index(x=written, begin=start, end=end, begin_mask=whole, end_mask=whole)
        return mb.squeeze(x=seen, axes=[0])

    def near(self, mask_NTS: Any, positions: Any, last: Any, seen: int) -> Any:
        """A mask without the keys that lie `seen` tokens back or more."""
        import numpy as np

        mb = self.mb
        query = self.reshape(self.to_float(positions), (1, 1, 1, -1, 1))
        key = self.reshape(self.to_float(mb.range_1d(start=0, end=last, step=1)), (1, 1, 1, 1, -1))
        reads = mb.greater(x=key, y=mb.sub(x=query, y=np.float32(seen)))
        return self.add(mask_NTS, mb.select(cond=reads, a=np.float16(0), b=np.float16(_LOW)))

    def _matrix(self, name: str) -> Any:
        return self._dense(name) if self.source.weights[name].scheme is None else self._packed(name)

    def _dense(self, name: str) -> Any:
        if name not in self.made:
            weight = self.source.weights[name]
            dtype = torch.float16 if holds(weight, torch.float16) else torch.float32
            full = torch.cat([weight.dequantize(start, stop).to(dtype) for start, stop in weight.chunks()])
            self.made[name] = self.mb.const(val=full.numpy(), name=_plain(name))
        return self.made[name]

    def _packed(self, name: str) -> Any:
        """Codes by a table of integers, times the scales."""
        if name not in self.made:
            from coremltools.converters.mil.mil import types

            weight = self.source.weights[name]
            scheme = weight.scheme
            assert scheme is not None
            kind = types.type_mapping.string_to_nptype(f"uint{scheme.bits}")
            parts = [weight.qtensor(start, stop) for start, stop in weight.chunks()]
            codes_OI = torch.cat([q.codes_OI for q in parts]).numpy().astype(kind)
            scale_OG = torch.cat([integers.unit(q, _scale_dtype(weight)) for q in parts]).numpy()
            zero = GRIDS.get(scheme.grid).zero(scheme)
            zero_OG = weight.scale_zero()[1] if zero is None else torch.tensor([[float(zero)]])
            levels_OGL = integers.step(zero_OG)[..., None] * (torch.arange(scheme.levels) - zero_OG[..., None])
            whole = self.mb.constexpr_lut_to_dense(
                indices=codes_OI, lut=levels_OGL[..., None].to(torch.int8).numpy(), name=f"{_plain(name)}_codes"
            )
            self.made[name] = self.mb.constexpr_blockwise_shift_scale(data=whole, scale=scale_OG, name=_plain(name))
        return self.made[name]

    def _pair(self, a: Any, b: Any) -> dict[str, Any]:
        """Two operands in one type: a number takes that of the other."""
        import numpy as np
        from coremltools.converters.mil.mil import types

        if isinstance(b, np.ndarray):
            b = b.astype(types.nptype_from_builtin(a.dtype))
        return {"x": a, "y": b}

    def _wide(self, value: Any) -> bool:
        from coremltools.converters.mil.mil import types

        return bool(value.dtype == types.fp32)

    def half(self, x: Any) -> Any:
        return self.mb.cast(x=x, dtype="fp16") if self._wide(x) else x


class _MilDecoder(decoder.Decoder[Any]):
    """With norms in float32, and keys and values in the program's state."""

    def __init__(self, graph: Any, source: Source, inputs: decoder.Inputs[Any], first: Any, last: Any) -> None:
        self.first, self.last = first, last
        super().__init__(graph, source, inputs)
        self.mil: _Mil = graph
        self.rotation = (self.mil.half(self.rotation[0]), self.mil.half(self.rotation[1]))

    def norm(self, x: Any, path: str) -> Any:
        mil: Any = self.g
        return mil.norm(x, f"{path}.weight", self.shape.eps)

    def grown(self, k_NKTD: Any, v_NKTD: Any, block: int) -> tuple[Any, Any]:
        past = self.inputs.past[block]
        pairs = zip(past, (k_NKTD, v_NKTD), strict=True)
        old_and_new = [self.mil.recalled(state, new, block, self.first, self.last) for state, new in pairs]
        return old_and_new[0], old_and_new[1]

    def mask(self, block: int) -> Any:
        seen = window(self.source.config, block)
        if seen not in self.masks:
            mask = self.mil.mb.expand_dims(x=self.inputs.mask_NS, axes=[2])
            near = partial(self.mil.near, mask, self.inputs.positions_NT, self.last)
            self.masks[seen] = mask if seen is None else near(seen)
        return self.masks[seen]


EXPORTS.register("coreml")(CoreMl)

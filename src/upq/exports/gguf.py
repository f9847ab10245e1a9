"""GGUF: llama.cpp, and all that is built on it (Ollama, LM Studio, KoboldCpp).

Every weight gets the smallest of GGML's types that holds it exactly; SEQ at 2 bits is Q2_K, see _ggml.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.progress import Progress
from upq.core.scheme import QuantScheme
from upq.exports._base import EXPORTS, Exporter, Options, Placement, Plan, Rows
from upq.exports._fp4 import outer
from upq.exports._ggml import BLOCKS, TERNARY
from upq.exports._source import Source, Weight
from upq.exports.dense import holds

if TYPE_CHECKING:
    import gguf
    import numpy as np

_DENSE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# llama.cpp's names of mixtures where they are not MOSTLY_ and the type.
_FILE_TYPES = {"Q2_K": "MOSTLY_Q2_K", "Q4_K": "MOSTLY_Q4_K_S", "F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}


class GgufOptions(Options):
    # Embedding and head. auto: the smallest of the types that hold them exactly.
    embeddings: Literal["auto", "q8_0", "f16", "bf16", "f32"] = "auto"
    tq2_0: bool = False  # TQ2_0 for 2-bit weights with a zero level: smaller than Q2_K, but not on every GPU


class Gguf(Exporter):
    """Linears, embedding and head that are not quantised are F16, BF16 or F32, whichever is exact first; all else
    (vectors, routers, biases of experts) is float32, as llama.cpp wants it. q and k are written in its order of rows,
    the experts of a block in one tensor."""

    Config = GgufOptions
    packages = ("gguf",)
    suffix = ".gguf"
    checked = "gguf's GGUFReader and dequantize"
    forms = frozenset({"linear", "stacked"})
    options: GgufOptions

    def holds(self, scheme: QuantScheme) -> bool:
        return True  # what no packed type holds is written as numbers

    def view(self, source: Source) -> Source:
        from upq.exports._llamacpp import view

        return view(source)

    def plan(self, source: Source) -> Plan:
        from upq.exports._llamacpp import LlamaCpp

        model = LlamaCpp(source.config)
        if lost := source.biases_beyond({source.config.model_type: model.family.biases}):
            raise UPQError(f"{source.path}: llama.cpp has no place for {lost[0]} in this family; export it as onnx")
        if model.family.own_head and source.tied:
            wanted = "llama.cpp wants a head beside the embedding in this family, and the model's are one"
            raise UPQError(f"{source.path}: {wanted}; export it as dense")
        notes = list(model.check())
        model.tensor_names(list(source.weights))
        if source.model.config is not source.config:
            notes.append("the language model alone: towers for images and sound are not in the file")
        notes += self._vocabulary(source).notes
        placements = tuple(self._place(source, weight) for weight in source.weights.values())
        unpacked: dict[str, list[str]] = {}  # why: which
        for p in placements:
            if p.weight.scheme is not None and p.carrier in _DENSE and p.loss is None:
                reasons = dict.fromkeys(filter(None, (block.misfit(p.weight) for block in BLOCKS)))
                unpacked.setdefault("; ".join(reasons), []).append(f"{p.weight.name} in {p.carrier}")
        for why, which in unpacked.items():
            more = f" and {len(which) - 1} more" if len(which) > 1 else ""
            notes.append(f"{which[0]}{more}: no packed type holds it exactly ({why})")
        return Plan(placements=placements, notes=tuple(notes))

    def write(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        import gguf

        from upq.exports._llamacpp import LlamaCpp

        model = LlamaCpp(source.config)
        names = model.tensor_names(list(source.weights))
        writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[model.arch])
        try:
            writer.add_name(source.name)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(_file_type(plan, source))
            model.describe(writer)
            self._vocabulary(source).describe(writer)
            extra = model.extra_tensors() | {
                _scale_name(names[p.weight.name]): _outer_scales(p.weight) for p in plan.placements if _has_outer(p)
            }
            for name, tensor in extra.items():
                writer.add_tensor_info(name, tensor.shape, tensor.numpy().dtype, tensor.nbytes)
            for p in plan.placements:
                kind, name = gguf.GGMLQuantizationType[p.carrier], names[p.weight.name]
                data = _empty(p).numpy()  # costs nothing until it is filled
                shape = (*p.weight.dense[:-1], -1) if p.weight.dense is not None else data.shape
                shape = data.reshape(shape).shape
                writer.add_tensor_info(name, shape, data.dtype, data.nbytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in extra.values():
                writer.write_tensor_data(tensor.numpy())
            for p in plan.placements:
                writer.write_tensor_data(_encode(p, model.row_order(p.weight.name, p.weight.shape[0])))
                progress.advance(1)
        finally:
            writer.close()

    def read(self, source: Source, plan: Plan, out: Path) -> Iterator[tuple[str, Rows]]:
        import gguf

        from upq.exports._llamacpp import LlamaCpp

        model = LlamaCpp(source.config)
        ours = {known: name for name, known in model.tensor_names(list(source.weights)).items()}
        scaled = {_scale_name(known): name for known, name in ours.items()}
        tensors = gguf.GGUFReader(out).tensors
        outer = {scaled[t.name]: torch.from_numpy(t.data.copy()) for t in tensors if t.name in scaled}
        for tensor in tensors:
            if tensor.name not in scaled and tensor.name not in model.extra_tensors():
                name = ours.get(tensor.name, tensor.name)
                order = model.row_order(name, int(tensor.shape[-1]))
                yield name, _rows(tensor, source.weights.get(name), order, outer.get(name))

    def _place(self, source: Source, weight: Weight) -> Placement:
        wanted = self.options.embeddings
        tables = (source.of_module(source.layout.embedding), source.of_module(source.layout.head))
        if weight in tables and wanted != "auto":
            return _placed(weight, wanted.upper())
        if weight not in tables and weight.name not in source.linears:
            return _placed(weight, "F32")
        if weight.scheme is not None:
            blocks = (TERNARY, *BLOCKS) if self.options.tq2_0 else BLOCKS
            block = next((block for block in blocks if block.misfit(weight) is None), None)
            if block is not None:
                placed = Placement(weight=weight, carrier=block.name, bytes=block.bytes_of(weight))
                more = _outer_scales(weight).nbytes if _has_outer(placed) else 0
                return replace(placed, bytes=placed.bytes + more)
        return _placed(weight, next(name for name, dtype in _DENSE.items() if name == "F32" or holds(weight, dtype)))

    def _vocabulary(self, source: Source) -> Any:
        from upq.exports._vocabulary import vocabulary

        table = source.of_module(source.layout.embedding)
        assert table is not None
        return vocabulary(source.tokenizer(), table.shape[0], source.ends())


def _placed(weight: Weight, carrier: str) -> Placement:
    if carrier in _DENSE:
        dtype = _DENSE[carrier]
        loss = None if holds(weight, dtype) else f"rounded to {carrier}"
        return Placement(weight=weight, carrier=carrier, bytes=weight.numel * dtype.itemsize, loss=loss)
    if weight.shape[1] % 32:
        raise UPQError(f"gguf: {weight.name} has rows of {weight.shape[1]}; {carrier} wants whole blocks of 32")
    return Placement(weight=weight, carrier=carrier, bytes=weight.numel // 32 * 34, loss="rounded to 8 bits")


def _file_type(plan: Plan, source: Source) -> int:
    """llama.cpp's name for the mixture: that of the type that most weights of the blocks have."""
    import gguf

    held: Counter[str] = Counter()
    for p in plan.placements:
        if p.weight.name in source.linears:
            held[p.carrier] += p.weight.numel
    carrier = held.most_common(1)[0][0]
    return int(gguf.LlamaFileType[_FILE_TYPES.get(carrier, f"MOSTLY_{carrier}")])


def _has_outer(p: Placement) -> bool:
    """Whether llama.cpp multiplies the products with it by a number that stands in a tensor of its own."""
    return p.carrier == "NVFP4"


def _scale_name(name: str) -> str:
    """Of that tensor. llama.cpp looks for it beside every weight of a block."""
    return f"{name.removesuffix('.weight')}.scale"


def _outer_scales(weight: Weight) -> Tensor:
    """One number, or one for each expert."""
    return torch.full((weight.dense[0] if weight.form == "stacked" and weight.dense else 1,), outer(weight))


def _empty(p: Placement) -> Tensor:
    """The tensor as the writer wants it: numbers, or rows of bytes where numpy has no such numbers."""
    dtype = _DENSE.get(p.carrier)
    if dtype in (torch.float32, torch.float16):
        return torch.empty(p.weight.shape, dtype=dtype)
    rows = p.weight.shape[:-1]
    whole = p.bytes - (_outer_scales(p.weight).nbytes if _has_outer(p) else 0)
    return torch.empty(*rows, whole // torch.Size(rows).numel(), dtype=torch.uint8)


def _encode(p: Placement, order: Tensor | None) -> np.ndarray[Any, Any]:
    import gguf

    weight, out = p.weight, _empty(p)
    block = next((block for block in (TERNARY, *BLOCKS) if block.name == p.carrier and p.loss is None), None)
    for start, stop in weight.chunks():
        if block is not None:
            out[start:stop] = block.encode(weight.qtensor(start, stop))
        elif p.carrier == "BF16":
            out[start:stop] = weight.dequantize(start, stop).bfloat16().view(torch.uint8)
        elif p.carrier in _DENSE:
            out[start:stop] = weight.dequantize(start, stop)
        else:
            rounded = gguf.quantize(weight.dequantize(start, stop).numpy(), gguf.GGMLQuantizationType[p.carrier])
            out[start:stop] = torch.from_numpy(rounded)
    return (out if order is None else out[order]).numpy()


def _rows(
    tensor: gguf.ReaderTensor, weight: Weight | None, order: Tensor | None, outer_E: Tensor | None = None
) -> Rows:
    """Rows of a tensor of the file, in transformers' order."""
    import gguf

    where = None if order is None else order.argsort().numpy()
    entries = tensor.data
    if weight is not None and weight.dense is not None:
        entries = entries.reshape(-1, entries.shape[-1])

    def rows(start: int, stop: int) -> Tensor:
        data = entries[start:stop] if where is None else entries[where[start:stop]]
        found = torch.from_numpy(gguf.dequantize(data, tensor.tensor_type).copy())
        if outer_E is None:
            return found
        of_rows = outer_E.repeat_interleave(len(entries) // len(outer_E))
        return found * of_rows[start:stop, None]

    return rows


EXPORTS.register("gguf")(Gguf)

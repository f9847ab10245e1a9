"""Hugging Face directories, written one piece at a time: tensors in shards, config, and the model's other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upq.core.bounded import read_json
from upq.exports._base import Rows
from upq.exports._source import Source
from upq.files.tensors import load_rows, tensor_shapes

Stored = Callable[[int, int | None], Tensor]  # (start, stop) to these rows, as stored

_SHARD = 5_000_000_000  # bytes, transformers' own default
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint32: "U32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """A tensor to be written. `parts` makes its content, from the first row to the last."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(
    out: Path,
    tensors: Sequence[TensorPlan],
    *,
    written: Callable[[], None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`model.safetensors`, or shards of at most 5 GB with their index; never more than one part in memory.

    `metadata` goes into the header of every shard.

    The library's own writer wants a whole shard as tensors; the format is a JSON header and the bytes in its order.
    """
    shards: list[list[TensorPlan]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > _SHARD:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        _write(out / "model.safetensors", shards[0], written, metadata)
        return
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write(out / name, shard, written, metadata)
        index |= {tensor.name: name for tensor in shard}
    content = {"metadata": {"total_size": sum(t.bytes for t in tensors)}, "weight_map": dict(sorted(index.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _write(
    path: Path, tensors: Sequence[TensorPlan], written: Callable[[], None], metadata: Mapping[str, str] | None
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.bytes
        header[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start on a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            before = file.tell()
            for part in tensor.parts():
                assert part.dtype == tensor.dtype
                file.write(part.contiguous().view(torch.uint8).numpy().data if part.numel() else b"")
            assert file.tell() - before == tensor.bytes, tensor.name
            written()


def write_config(source: Source, out: Path, changes: Mapping[str, Any]) -> None:
    """The artefact's config.json without its quantisation, with `changes`."""
    config = read_json(source.path / "config.json", remedy="copy the artefact again")
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config | dict(changes), indent=2) + "\n")


def copy_companions(source: Source, out: Path) -> None:
    for file in source.companions():
        shutil.copyfile(file, out / file.name)


def in_float32(stored: Stored) -> Rows:
    return lambda start, stop: stored(start, stop).float()


def stored_rows(out: Path) -> Iterator[tuple[str, Stored]]:
    """Every tensor of a directory's safetensors files, and a reader of its rows."""
    for file in sorted(out.glob("*.safetensors")):
        for name in tensor_shapes(file):
            yield name, partial(load_rows, file, name)

"""Hugging Face directories, written one piece at a time: tensors in shards, config, and the model's other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from upq.core.bounded import read_json
from upq.exports._base import Rows
from upq.exports._source import Source
from upq.files.tensors import TensorPlan, load_rows, tensor_shapes, write_tensors

Stored = Callable[[int, int | None], Tensor]  # (start, stop) to these rows, as stored

_SHARD = 5_000_000_000  # bytes, transformers' own default


def write_shards(
    out: Path,
    tensors: Sequence[TensorPlan],
    *,
    written: Callable[[], None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`model.safetensors`, or shards of at most 5 GB with their index; never more than one part in memory.

    `metadata` goes into the header of every shard. `written` is called after each tensor.
    """

    def write(name: str, shard: Sequence[TensorPlan]) -> None:
        write_tensors(out / name, shard, {"format": "pt", **(metadata or {})}, wrote=lambda _: written())

    shards: list[list[TensorPlan]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > _SHARD:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write("model.safetensors", shards[0])
        return
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write(name, shard)
        index |= {tensor.name: name for tensor in shard}
    content = {"metadata": {"total_size": sum(t.bytes for t in tensors)}, "weight_map": dict(sorted(index.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


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

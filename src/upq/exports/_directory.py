"""Exports that are Hugging Face directories: the model's files, config.json, and the artefact's other files."""

from __future__ import annotations

import json
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from upq.core.bounded import read_json
from upq.core.progress import Progress
from upq.exports._base import Exporter, Placement, Plan, Rows
from upq.exports._older import older_keys
from upq.exports._source import Source
from upq.files.tensors import TensorPlan, load_rows, tensor_shapes, write_tensors

_SHARD = 5_000_000_000  # bytes, transformers' own default


class DirectoryExporter(Exporter):
    """A Hugging Face directory. A format adds its model files and keys of config.json."""

    @abstractmethod
    def save(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        """The model's own files, into the directory `out`; one `progress.advance()` for each weight."""

    @abstractmethod
    def config(self, source: Source, plan: Plan) -> Mapping[str, Any]:
        """Keys of config.json that are not the artefact's, or have another value there."""

    def write(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        out.mkdir()
        self.save(source, plan, out, progress)
        config = read_json(source.path / "config.json", remedy="copy the artefact again")
        del config["quantization_config"]
        # A head of its own that the flag denies is dropped by engines.
        config = config | {"tie_word_embeddings": source.tied} | dict(self.config(source, plan))
        (out / "config.json").write_text(json.dumps(config | older_keys(config), indent=2) + "\n")
        for file in source.companions():
            target = out / file.relative_to(source.path)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


class SafetensorsExporter(DirectoryExporter):
    """A directory whose weights are safetensors files: `plan` gives each weight its tensors, `rows` reads them."""

    def metadata(self, source: Source, plan: Plan) -> Mapping[str, str]:
        """What the header of every file has beside its format."""
        return {}

    def rows(self, p: Placement, stored: Stored, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a weight as the engine reads it, in float32; here of one that is not packed."""
        weight = p.weight
        if weight.dense is None:
            return stored.rows(weight.name, start, stop).float()
        each = weight.shape[0] if len(weight.dense) == 2 else weight.shape[0] // weight.dense[0]  # rows of an entry
        first, last = (0, None) if len(weight.dense) == 2 else (start // each, -(-stop // each))
        return weight.tall(stored.rows(weight.name, first, last))[start - first * each : stop - first * each].float()

    def save(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        last = {p.tensors[-1].name for p in plan.placements}

        def wrote(tensor: TensorPlan) -> None:
            if tensor.name in last:
                progress.advance(1)

        tensors = [tensor for p in plan.placements for tensor in p.tensors]
        _write_shards(out, tensors, {"format": "pt", **self.metadata(source, plan)}, wrote)

    def read(self, source: Source, plan: Plan, out: Path) -> Iterator[tuple[str, Rows]]:
        stored = Stored(out)
        for p in plan.placements:
            yield p.weight.name, partial(self.rows, p, stored)


class Stored:
    """The tensors of a directory's safetensors files, as stored, and its config.json."""

    def __init__(self, out: Path) -> None:
        self.config: dict[str, Any] = json.loads((out / "config.json").read_text())
        self._files = {name: file for file in out.glob("*.safetensors") for name in tensor_shapes(file)}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return load_rows(self._files[name], name, start, stop)


def _write_shards(
    out: Path, tensors: Sequence[TensorPlan], metadata: Mapping[str, str], wrote: Callable[[TensorPlan], None]
) -> None:
    """`model.safetensors`, or shards of at most 5 GB with their index; never more than one part in memory."""
    shards: list[list[TensorPlan]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > _SHARD:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_tensors(out / "model.safetensors", shards[0], metadata, wrote=wrote)
        return
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_tensors(out / name, shard, metadata, wrote=wrote)
        index |= {tensor.name: name for tensor in shard}
    content = {"metadata": {"total_size": sum(t.bytes for t in tensors)}, "weight_map": dict(sorted(index.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")

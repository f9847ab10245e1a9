"""The tensors of a checkpoint under the names, and in the shapes, that the model has in memory.

A checkpoint may hold them otherwise: an expert a tensor where the model has one for all, q, k and v in one, other
names. What leads from one to the other are transformers' own conversions; a tensor is made when it is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from upq.core.errors import UPQError
from upq.files.tensors import tensor_shapes
from upq.model.library import library_errors


@dataclass
class _Part:
    """What the files hold of one or more tensors of the model."""

    first: str  # the model's name under which a converter finds all of them
    converter: Any = None  # None: the file's tensor is the model's
    sources: list[tuple[str, str]] = field(default_factory=list)  # pattern of the converter, name in the files


class Checkpoint:
    """Law (tests/test_walker.py): its tensors are those of the model that transformers loads, bit for bit."""

    def __init__(self, path: Path, files: Mapping[str, Path], model: PreTrainedModel) -> None:
        """`model` may be without memory. Nothing but the headers of the files is read."""
        self.path, self._files = path, files
        shapes = {name: shape for file in set(files.values()) for name, shape in tensor_shapes(file).items()}
        self._model = model
        self._expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._tied = dict(model.all_tied_weights_keys)
        with library_errors(f"{path}: its tensors cannot be matched with those of {type(model).__name__}"):
            self._parts = self._matched(model)
            self._shapes = self._converted_shapes(shapes)

    def __contains__(self, name: str) -> bool:
        """Whether the files hold it, under this name and not only under that of a tensor that is tied to it."""
        return name in self._parts

    def check(self) -> None:
        """Raises UPQError for a tensor of the model that is missing or has another shape."""
        for name in self._expected:
            self._place(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """In the model."""
        return self._expected[name]

    def tensor(self, name: str, *, rows: Tensor | None = None) -> Tensor:
        """A tensor of the model by its name in memory, all of it or some rows, in the type of the files.

        Raises UPQError where it is missing, has another shape, or holds NaN or infinity.
        """
        name = self._place(name)
        part = self._parts[name]
        if part.converter is None:
            tensor = self._raw(part.sources[0][1])  # mapped: what is not looked at is not read
            if rows is not None:
                tensor = tensor[rows]
        else:
            converter = copy.deepcopy(part.converter)
            for pattern, source in part.sources:
                converter.add_tensor(name, source, pattern, self._raw(source))
            with library_errors(f"{self.path}: cannot make {name} of {part.sources[0][1]}"):
                tensor = _only(self._convert(converter, part.first)[name])
            tensor = tensor if rows is None else tensor[rows]
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UPQError(f"{self.path}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
        return tensor

    def dtype(self) -> torch.dtype:
        """Of the first tensor of the first file: transformers' rule for a configuration that names no type."""
        with opened(min(self._files.values())) as file:
            dtypes = (file.get_tensor(name).dtype for name in file.keys())  # noqa: SIM118  (not a mapping)
            return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def _place(self, name: str) -> str:
        """The name under which the files have it: its own, or that of a tensor that is tied to it."""
        found = name
        if name not in self._parts:
            others = [self._tied.get(name), *(tied for tied, to in self._tied.items() if to == name)]
            found = next((other for other in others if other in self._parts), "")
        if not found:
            raise UPQError(f"{self.path}: tensor {name} is missing from the checkpoint; is the download complete?")
        if self._shapes[found] != self._expected[name]:
            shapes = f"{self._shapes[found]}, but the config says {self._expected[name]}"
            raise UPQError(f"{self.path}: tensor {name} has shape {shapes}; is config.json of this model?")
        return found

    def _raw(self, name: str) -> Tensor:
        with opened(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _matched(self, model: PreTrainedModel) -> dict[str, _Part]:
        """By name in the model. Transformers' own order of steps (`convert_and_load_state_dict_in_model`)."""
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        state, prefix, parts = self._expected, model.base_model_prefix, dict[str, _Part]()
        for name in sorted(self._files, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if renamed not in state and name in state:
                renamed, pattern = rename_source_key(name, [], [], prefix, state)
            if renamed in state:
                part = parts.setdefault(renamed, _Part(renamed))
                part.converter = None if pattern is None else of_pattern[pattern]
                part.sources.append((pattern or name, name))
        return parts

    def _converted_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """By name in the model. A converter may make several tensors of what is found under the name of the first."""
        found = dict[str, tuple[int, ...]]()
        for first, part in list(self._parts.items()):
            if part.converter is None:
                found[first] = tuple(shapes[part.sources[0][1]])
                continue
            converter = copy.deepcopy(part.converter)
            for pattern, source in part.sources:
                converter.add_tensor(first, source, pattern, torch.empty(shapes[source], device="meta"))
            for name, tensor in self._convert(converter, first).items():
                found[name] = tuple(_only(tensor).shape)
                self._parts[name] = part
        return found

    def _convert(self, converter: Any, first: str) -> dict[str, Any]:
        made: dict[str, Any] = converter.convert(first, model=self._model, config=self._model.config)
        return made


def _only(made: Any) -> Tensor:
    tensor: Tensor = made[0] if isinstance(made, list) else made
    return tensor


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UPQError(f"{file}: damaged or truncated ({reason}); is the download complete?") from error

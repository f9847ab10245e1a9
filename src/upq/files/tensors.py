"""Safetensors files: written whole, read with errors that say what to do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upq.core.bounded import parse_json, read_json
from upq.core.errors import UPQError
from upq.files.atomic import atomic_write

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_METADATA = "upq"  # one key: safetensors writes several in a random order, and equal content must give equal bytes


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """A safetensors file with JSON metadata; equal content gives equal bytes."""
    described = {_METADATA: json.dumps(dict(metadata or {}), sort_keys=True)}
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share storage; all others go to disk without a copy in memory.
        if own.untyped_storage().data_ptr() in seen or own.untyped_storage().nbytes() != own.nbytes:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        plain[name] = own
    atomic_write(path, lambda file: safetensors.torch.save_file(plain, file.name, described))


@contextlib.contextmanager
def complete(path: Path) -> Iterator[None]:
    """What is looked up in a file of the run is there, or an UPQError names it."""
    try:
        yield
    except KeyError as error:
        raise UPQError(f"{path}: {error} is missing; delete it and run the same command again") from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote: tensors on the CPU and the metadata."""
    with _readable(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        return tensors, _metadata(file, path)


def load_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_tensors` wrote; no tensor is read."""
    with _readable(path), safe_open(path, framework="pt") as file:
        return _metadata(file, path)


def _metadata(file: Any, path: Path) -> dict[str, Any]:
    raw = (file.metadata() or {}).get(_METADATA, "{}").encode()
    metadata = parse_json(raw, str(path), remedy="delete it and run the same command again")
    return metadata if isinstance(metadata, dict) else {}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a safetensors file by name, from its header only."""
    with _readable(path), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def load_rows(path: Path, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of one tensor of a safetensors file; of all the others nothing is read."""
    # Opened anew each time: a file that stays mapped counts as memory for every page ever read.
    with _readable(path), safe_open(path, framework="pt") as file:
        rows: Tensor = file.get_slice(name)[start:stop]
        return rows


def plain_name(name: object, where: str) -> str:
    """A file of the directory itself: a list in a downloaded file must not lead to other files of this machine."""
    # Symlinks are followed, for a hub snapshot is made of them.
    if not isinstance(name, str) or name in ("", ".", "..") or not {"/", "\\", "\0", ":"}.isdisjoint(name):
        raise UPQError(f"{where}: names {name!r}, which is no file name of this directory; do not use it")
    return name


def tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name to safetensors file of a model directory: of the single file, or else as the index says."""
    index, single = path / INDEX, path / WEIGHTS
    if single.is_file():  # first, as in transformers: what is checked is what is loaded
        return dict.fromkeys(tensor_shapes(single), single)
    if not index.is_file():
        raise UPQError(f"{path}: no {WEIGHTS}; {_instead(path)}")
    files = {name: path / file for name, file in _weight_map(index).items()}
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise UPQError(f"{path}: shard {file.name} named by the index is missing; is the download complete?")
    return files


def shard_names(index: Path) -> list[str]:
    """The files that an index of tensors names."""
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    raw = read_json(index, remedy="is the download complete?")
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UPQError(f"{index}: not an index of tensors; is the download complete?")
    return {name: plain_name(file, str(index)) for name, file in weight_map.items()}


def _instead(path: Path) -> str:
    found = sorted(p.name for kind in _PICKLES for p in path.glob(kind))
    if not found:
        return "is the download complete?"
    return (
        f"found {found[0]}, a pickle, which can run any code when it is read and never is here. If you trust it,"
        ' convert it: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;'
        f" d = '{path}';"
        " m = M.from_pretrained(d, use_safetensors=False, dtype='auto'); m.save_pretrained(d + '-safe');"
        " T.from_pretrained(d).save_pretrained(d + '-safe')\""
    )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UPQError(f"{path}: no such file; the stage that writes it has not run here") from None
    except (SafetensorError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UPQError(
            f"{path}: damaged or truncated ({reason}); delete it and run the same command again, or copy or"
            " download it again"
        ) from error

"""Safetensors files: written whole, read with errors that say what to do."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upq.core.bounded import parse_json, read_json
from upq.core.errors import UPQError
from upq.core.pointers import check_pointer
from upq.files.atomic import written

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_METADATA = "upq"  # the key of what `save_tensors` is given


# To the format's names, in its order: a library's file has the last of these first.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """A tensor to write. `parts` makes its content, from the first row to the last: it need not fit into memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def pieces(self) -> Iterator[memoryview]:
        """The bytes of each part."""
        size = 0
        for part in self.parts():
            assert part.dtype == self.dtype, self.name
            size += part.nbytes
            yield part.contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert size == self.bytes, self.name


def write_tensors(
    path: Path,
    tensors: Sequence[TensorPlan],
    metadata: Mapping[str, str],
    *,
    digest: str | None = None,
    wrote: Callable[[TensorPlan], None] = lambda _: None,
) -> None:
    """A safetensors file of these tensors in this order, of which one part at a time is in memory.

    `digest`: the key of the metadata that gets the sha256 over the tensors. `wrote` is called after each tensor.
    Equal content gives equal bytes. Readers want aligned data, so types of more bytes come first.

    The library's own writer wants all tensors at once; the format is a JSON header and the bytes in its order.
    """
    sha256 = hashlib.sha256()
    with written(path) as scratch, scratch.open("wb") as file:
        # The digest is known last and stands first: one of the same length keeps its place.
        file.write(_header(tensors, {**metadata, digest: "0" * 64} if digest else metadata))
        for tensor in tensors:
            for piece in tensor.pieces():
                file.write(piece)
                if digest:
                    sha256.update(piece)
            wrote(tensor)
        if digest:
            file.seek(0)
            file.write(_header(tensors, {**metadata, digest: sha256.hexdigest()}))


def _header(tensors: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.bytes]
        table[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        at += tensor.bytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data start on a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """A safetensors file with JSON metadata. Law (tests/test_files.py): the bytes of the library's own writer."""
    rank = list(_DTYPES)
    ordered = sorted(tensors.items(), key=lambda item: (-rank.index(item[1].dtype), item[0]))
    plans = [
        TensorPlan(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), parts=partial(_on_cpu, tensor))
        for name, tensor in ordered
    ]
    write_tensors(path, plans, {_METADATA: json.dumps(dict(metadata or {}), sort_keys=True)})


def _on_cpu(tensor: Tensor) -> list[Tensor]:
    return [tensor.detach().cpu()]


@contextlib.contextmanager
def keys_required(path: Path) -> Iterator[None]:
    """A key that is missing from what was read from `path` is an UPQError that names it."""
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


def tensor_types(path: Path) -> dict[str, str]:
    """The types of a safetensors file's tensors by name, in the format's own words, from its header only."""
    with _readable(path), safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def load_rows(path: Path, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of one tensor of a safetensors file; of all the others nothing is read."""
    # Opened anew each time: a file that stays mapped counts as memory for every page ever read.
    with _readable(path), safe_open(path, framework="pt") as file:
        held = file.get_slice(name)
        rows: Tensor = held[start:stop] if held.get_shape() else file.get_tensor(name)  # a number has no rows
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
        check_pointer(single)
        return dict.fromkeys(tensor_shapes(single), single)
    if not index.is_file():
        raise UPQError(f"{path}: no {WEIGHTS}; {_instead(path)}")
    files = {name: path / file for name, file in _weight_map(index).items()}
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise UPQError(f"{path}: shard {file.name} named by the index is missing; is the download complete?")
        check_pointer(file)
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
    if others := sorted(p.name for p in path.glob("*.safetensors")):
        return f"found {others[0]}, which no {INDEX} lists; is the download complete, and in transformers' form?"
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

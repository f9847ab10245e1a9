"""Files of a run: written whole or not at all, read with errors that say what to do, and named by their digest."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upq.bounded import parse_json, read_json
from upq.errors import UPQError
from upq.recipe import Strict, decode

MANIFEST = "upq.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MANIFEST_VERSION = 1
_METADATA = "upq"  # one key: safetensors writes several in a random order, and equal content must give equal bytes
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROOM = 1 << 16  # bytes; a disk with less is full: a write that fails has filled it up to the last block
_MODEL_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


# --- writing -------------------------------------------------------------------------------------------------------


def atomic_write(path: Path, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write `path` whole: into a neighbour first, then renamed. On any failure `path` is as it was before."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained(path):
            with tmp.open("wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A scratch directory whose files move into `out` on success, each whole; on failure `out` is as it was before."""
    with explained(out):
        scratch = Path(tempfile.mkdtemp(prefix=".upq-", dir=out))
    try:
        with explained(out):
            yield scratch
            umask = os.umask(0)
            os.umask(umask)
            for file in sorted(scratch.iterdir()):
                file.chmod(0o666 & ~umask)  # safetensors creates files that only their owner can read
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            for file in sorted(scratch.iterdir()):
                file.replace(out / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A scratch path beside `out`, for a file or a directory, that gets its name on success; on failure it goes."""
    scratch = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with explained(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            yield scratch
            for file in scratch.rglob("*") if scratch.is_dir() else [scratch]:
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            scratch.replace(out)
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        elif scratch.exists():
            scratch.unlink()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into one line with a remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = _is_full(error, path)
        remedy = "free some space and run the same command again" if full else "check the path and its permissions"
        reason = "no space left on the device" if full else getattr(error, "strerror", None) or str(error)
        raise UPQError(f"{path}: cannot write: {reason}; {remedy}") from error


def _is_full(error: OSError | SafetensorError, path: Path) -> bool:
    """Whether a write failed for want of space; libraries tell it in words of their own, or not at all."""
    if (code := getattr(error, "errno", None)) is not None:
        return code in _FULL
    if any(f"os error {code}" in str(error) for code in _FULL):  # safetensors
        return True
    return path.parent.is_dir() and shutil.disk_usage(path.parent).free < _ROOM


# --- tensors -------------------------------------------------------------------------------------------------------


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
        f"found {found[0]}, a pickle, which can run any code when it is read and never is here. Whoever trusts it"
        ' converts it: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;'
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


# --- manifest ------------------------------------------------------------------------------------------------------


class SourceModel(Strict):
    path: str
    digest: str  # of the files, see digest_model_dir


class Layer(Strict):
    name: str
    bits: int
    group_size: int
    grid: str
    weights: int  # number of weights
    bits_per_weight: float  # stored, scales included
    error: float | None = None  # of the weights as the INT2 stage left them: ‖Ŵ - W‖ / ‖W‖


class FileEntry(Strict):
    bytes: int
    sha256: str


class Manifest(Strict):
    """`upq.json`: how an artefact came about and what it holds. Written last, so its presence means complete."""

    manifest_version: int = MANIFEST_VERSION
    recipe: dict[str, Any] = Field(default_factory=dict)
    model: SourceModel
    versions: dict[str, str] = Field(default_factory=dict)
    data: list[dict[str, Any]] = Field(default_factory=list)
    layers: list[Layer] = Field(default_factory=list)
    # By model: "source" and "artifact"; keys as in `upq eval --json`: ppl, kld, top1, bits_per_weight, bytes, compute,
    # tasks.
    metrics: dict[str, dict[str, Any]] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)  # by stage
    peak_memory_bytes: int | None = None
    skipped_steps: list[int] = Field(default_factory=list)  # of the training: their loss or gradient was not finite
    files: dict[str, FileEntry] = Field(default_factory=dict)


def read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not path.exists():
        raise UPQError(f"{directory}: no {MANIFEST} here; is it a finished UPQ artefact?")
    raw = read_json(path, remedy="delete it and run the same command again")
    if isinstance(raw, dict) and isinstance(found := raw.get("manifest_version"), int) and found > MANIFEST_VERSION:
        raise UPQError(f"{path}: written by a newer upq (manifest {found}); upgrade: pip install -U upq")
    manifest = decode(Manifest, raw, str(path))
    for name in manifest.files:
        plain_name(name, str(path))
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    atomic_write(directory / MANIFEST, text + "\n")


def verify(directory: Path, manifest: Manifest) -> None:
    """UPQError that names the first file of an artefact which is not what its manifest says.

    Every file is read: about as fast as SHA-256 goes, if the disk does.
    """
    remedy = "copy or download the artefact again"
    for name, entry in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise UPQError(f"{file}: missing, though {MANIFEST} lists it with sha256 {entry.sha256}; {remedy}")
        if (size := file.stat().st_size) != entry.bytes:
            raise UPQError(f"{file}: damaged: of {size} bytes, {MANIFEST} says {entry.bytes}; {remedy}")
        if (found := digest_file(file)) != entry.sha256:
            raise UPQError(f"{file}: damaged: its sha256 is {found}, {MANIFEST} says {entry.sha256}; {remedy}")


# --- digests -------------------------------------------------------------------------------------------------------


def digest_file(path: Path) -> str:
    """SHA-256 of the content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=digest_file(path))


def model_digests(path: Path) -> dict[str, str]:
    """SHA-256 of each configuration, weight and tokenizer file of a model directory."""
    files = sorted({file for pattern in _MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    if not any(file.name == "config.json" for file in files):
        raise UPQError(f"{path}: no config.json in this directory; is it a Hugging Face model?")
    return {file.name: digest_file(file) for file in files}


def digest_model_dir(path: Path) -> str:
    """SHA-256 over `model_digests`: the same model has the same, wherever it lies."""
    return digest_of(model_digests(path))


def digest_of(files: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in files.items()).encode()).hexdigest()

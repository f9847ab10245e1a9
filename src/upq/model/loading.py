"""Reading Hugging Face models and tokenizers, with errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.hub import cached_file, cached_files

from upq.core.bounded import parse_json, read_bytes, read_json
from upq.core.errors import UPQError
from upq.files.tensors import INDEX, WEIGHTS, shard_names, tensor_files, tensor_shapes, tensor_types
from upq.model.families._base import FAMILIES, ModelSpec
from upq.text.tokenizer import as_stored, class_tokens, of_same_kind, tokenizer_files

_CONFIG = "is config.json of this model?"
_TOKENS = "is it a tokenizer's file?"
# Of these transformers makes lists before there are tensors to compare with.
_COUNTS = {"num_hidden_layers": 10_000, "num_labels": 10_000}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
_REASON = 300  # characters of what a library says
_TOKENIZER_BYTES, _TOKENIZER_VALUES = 64 << 20, 4 << 20  # a vocabulary of 262,000 has 33 MB and 2 million values


def load_config(model: str | Path) -> PretrainedConfig:
    """The configuration of a directory or hub id. No code from the model is ever run."""
    _check_directory(model)
    file = Path(model) / "config.json"
    if not file.is_file():
        with library_errors(f"{model}: cannot load with AutoConfig", _offline(model)):
            file = Path(str(cached_file(str(model), "config.json")))
    _check_raw(read_json(file, remedy=_CONFIG), file)
    config: PretrainedConfig = _read(AutoConfig, model)
    if config._attn_implementation not in ("eager", "sdpa"):  # a wish: what another machine or device has
        config._attn_implementation = None  # the best of transformers' own
    return config


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    _check_directory(model)
    path, stored = tokenizer_directory(model), None
    for file in tokenizer_files(path):
        raw = read_bytes(file, _TOKENIZER_BYTES, remedy=_TOKENS)
        if file.suffix == ".json":
            value = parse_json(raw, str(file), remedy=_TOKENS, values=_TOKENIZER_VALUES)
            stored = value if file.name == "tokenizer.json" else stored
    if stored is None and find_spec("sentencepiece") is None and (path / "tokenizer.model").is_file():
        raise UPQError(f"{path}: tokenizer.model is a SentencePiece model; pip install sentencepiece protobuf")
    tokenizer: PreTrainedTokenizerBase = _read(AutoTokenizer, model)
    with library_errors(f"{model}: cannot use tokenizer.json"):
        if not of_same_kind(tokenizer, stored):  # the class has rules for another kind of vocabulary
            tokenizer = _read(PreTrainedTokenizerFast, model)
        if added := class_tokens(tokenizer, stored, path):
            tokenizer = _read(type(tokenizer), model, **dict.fromkeys(added))
        return as_stored(tokenizer, stored)


def tokenizer_directory(model: str | Path) -> Path:
    """The directory itself, or that of the hub's snapshot."""
    if Path(model).is_dir():
        return Path(model)
    with library_errors(f"{model}: cannot load with AutoTokenizer", _offline(model)):
        found = cached_file(str(model), "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    return Path(model) if found is None else Path(found).parent


def load_model(model: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
    """A causal LM in evaluation mode, any form that transformers loads (an UPQ artefact after `import upq`).

    Sizes and shapes are compared with the headers of the files before memory is taken for any of them.
    """
    config = load_config(model)
    family(config)
    path = _downloaded(model)
    _check_weights(path, config)
    _check_settings(path)
    with _one_thread() if torch.device(device).type == "cpu" else nullcontext():  # a GPU's memory is another
        loaded: PreTrainedModel = _read(AutoModelForCausalLM, path, config=config, dtype=dtype, use_safetensors=True)
    loaded.eval()  # type: ignore[no-untyped-call]
    loaded.to(device)  # type: ignore[arg-type]
    return loaded


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors are read one after the other, and not in up to four threads.

    What a thread allocates comes from a heap of its own, of which glibc keeps up to 64 MB when all has been freed:
    after the training of a model of width 1024, 117 MB. A 1B loads in 6.5 s of one core for 9.5.
    """
    key = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers has no argument for it
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def generation_config(path: Path) -> GenerationConfig:
    """How the model of a directory is to generate, as a loaded model has it."""
    source: dict[str, Any] = {}
    if not _check_settings(path):  # older models say it in their config.json
        source = {"config_file_name": "config.json", "_from_model_config": True}
    found: GenerationConfig = _read(GenerationConfig, path, **source)
    return found


def _check_settings(path: Path) -> bool:
    settings = path / "generation_config.json"
    if settings.is_file():
        read_json(settings, remedy="correct it or leave it out")
    return settings.is_file()


def check_sizes(path: Path, config: PretrainedConfig, files: Iterable[Path]) -> None:
    """Every size in `config` is a dimension of some tensor, so none is larger than the files have bytes.

    To be asked before a module is built from `config`, on the meta device too: rotary frequencies take real memory
    there, and each block takes time. Raises UPQError.
    """
    weights = set(files)
    total, tensors = sum(file.stat().st_size for file in weights), sum(len(tensor_shapes(file)) for file in weights)
    for key in (*_SIZES, "num_hidden_layers"):
        size, limit, of = getattr(config, key, None), total, "bytes"
        if key == "num_hidden_layers":
            limit, of = tensors, "tensors"
        if size is not None and (type(size) is not int or not 1 <= size <= limit):
            raise UPQError(f"{path}: config.json says {key}={size!r}, its weights are {limit:,} {of}; {_CONFIG}")


def check_types(path: Path, config: PretrainedConfig, files: Iterable[Path]) -> None:
    """Weights of other types than floats are codes, and what belongs to them stands in a quantization_config."""
    if getattr(config, "quantization_config", None) is not None:
        return
    for file in sorted(set(files)):
        for name, dtype in tensor_types(file).items():
            if name.endswith("weight") and dtype not in _FLOATS:
                kind = "float8" if dtype.startswith("F8") else dtype
                what = f"tensor {name} is stored in {kind}, and config.json says nothing of its scales"
                raise UPQError(f"{path}: {what}; give the model in BF16, FP16 or FP32")


def stored_name(name: str, stored: Container[str], tied: Mapping[str, str]) -> str:
    """The name under which a checkpoint has a tensor: its own, or else that of one that is tied to it, either way."""
    others = [tied.get(name), *(other for other, to in tied.items() if to == name)]
    return next((other for other in (name, *others) if other is not None and other in stored), name)


def family(config: PretrainedConfig) -> ModelSpec:
    """Where the parts of this model are; a family that is not known is an error that lists those that are."""
    if config.model_type not in FAMILIES.names():
        _unknown(config.model_type)
    return FAMILIES.get(config.model_type)


def embedding_rows(config: PretrainedConfig) -> int:
    rows: int = config.get_text_config().vocab_size
    return rows


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's own list: what is put into it is in the model."""
    blocks = model.get_submodule(family(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def check_finite(model: PreTrainedModel, name: str | Path) -> None:
    """UPQError that names the first tensor of a loaded model with NaN or infinity in it."""
    for path, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UPQError(f"{name}: tensor {path} holds NaN or infinity; the checkpoint is damaged")


def _unknown(name: object) -> NoReturn:
    known = ", ".join(FAMILIES.names())
    raise UPQError(f"model family {name!r} is not supported (known: {known}); see docs/adding.md")


def _check_directory(model: str | Path) -> None:
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UPQError(f"{path}: no config.json in this directory; is it a Hugging Face model?")
    if (path / "adapter_config.json").exists():  # transformers would go on to whatever model it names
        raise UPQError(f"{path}: holds an adapter (adapter_config.json); merge it into its model and save that")
    looks_like_path = str(model).startswith((".", "/", "~")) or str(model).count("/") > 1
    if looks_like_path and not path.is_dir():
        raise UPQError(f"{model}: no such directory")


def _check_raw(raw: Any, file: Path) -> None:
    """What has to hold before transformers makes a configuration of it."""
    if not isinstance(raw, dict):
        raise UPQError(f"{file}: expected an object, got {type(raw).__name__}; {_CONFIG}")
    if raw.get("model_type") not in FAMILIES.names():
        _unknown(raw.get("model_type"))
    if raw.get("transformers_weights") not in (None, WEIGHTS, INDEX):  # it would be read in place of what is checked
        raise UPQError(f"{file}: transformers_weights must be {WEIGHTS}; rename the file and remove the key")
    for key, value in raw.items():
        if key in _COUNTS and isinstance(value, int | float) and value > _COUNTS[key]:
            raise UPQError(f"{file}: {key}={value} is more than {_COUNTS[key]}; {_CONFIG}")
        # "owner/name" is a kernel of the hub, which is code.
        if key.endswith("_implementation") and "/" in str(value):
            raise UPQError(f"{file}: {key}={value!r} names code on the hub, which is not run; remove the key")


def _check_weights(path: Path, config: PretrainedConfig) -> None:
    """Compare config.json with the headers of the weights; of other quantised formats only the sizes."""
    files = tensor_files(path)
    check_sizes(path, config, files.values())
    if getattr(config, "quantization_config", None) is not None:  # UPQ's own are compared by upq.artifact.transformers
        return
    check_types(path, config, files.values())
    shapes = {name: shape for file in set(files.values()) for name, shape in tensor_shapes(file).items()}
    auto: Any = AutoModelForCausalLM  # untyped
    with library_errors(f"{path}: config.json describes no model"), torch.device("meta"):
        skeleton: PreTrainedModel = auto.from_config(config)
    for name, tensor in skeleton.state_dict().items():
        if stored_name(name, shapes, skeleton.all_tied_weights_keys) not in shapes:
            raise UPQError(f"{path}: tensor {name} is missing from the checkpoint; is the download complete?")
        if name in shapes and shapes[name] != tuple(tensor.shape):
            what = f"has shape {shapes[name]}, but the config says {tuple(tensor.shape)}"
            raise UPQError(f"{path}: tensor {name} {what}; is config.json of this model?")


def _downloaded(model: str | Path) -> Path:
    """The directory itself, or that of the hub's snapshot once configuration and weights are there."""
    _check_directory(model)
    if Path(model).is_dir():
        return Path(model)
    with library_errors(f"{model}: cannot load with AutoModelForCausalLM", _offline(model)):
        for name in ("config.json", "generation_config.json"):
            cached_file(str(model), name, _raise_exceptions_for_missing_entries=False)
        weights = cached_file(str(model), WEIGHTS, _raise_exceptions_for_missing_entries=False)
        if weights is None and (index := cached_file(str(model), INDEX, _raise_exceptions_for_missing_entries=False)):
            weights = next(iter(cached_files(str(model), shard_names(Path(index))) or []), None)
    if weights is None:
        raise UPQError(f"{model}: has no {WEIGHTS}; other kinds of weights, pickles above all, are not read")
    return Path(weights).parent


@contextmanager
def library_errors(doing: str, remedy: str = "") -> Iterator[None]:
    """Whatever a library raises on a file that a stranger wrote is one line."""
    try:
        yield
    except UPQError:
        raise
    except BaseException as error:
        # A panic of the Rust libraries is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind, text = type(error).__name__, str(error).strip()
        if isinstance(error, OSError | ValueError | ImportError):  # written for people, and at length
            reason = next(iter(text.splitlines()), kind)
        else:
            reason = f"{kind}: {' '.join(text.split())[:_REASON]}"
        raise UPQError(f"{doing}: {reason}{remedy}") from error


def _read(auto: Any, model: str | Path, **options: Any) -> Any:
    with library_errors(f"{model}: cannot load with {auto.__name__}", _offline(model)):
        return auto.from_pretrained(str(model), trust_remote_code=False, **options)


def _offline(model: str | Path) -> str:
    return "" if Path(model).is_dir() else "; offline, name a local directory"

"""Reading Hugging Face models and tokenizers, with errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers import __version__ as _VERSION
from transformers.utils.hub import cached_file, cached_files

from upq.core.bounded import parse_json, read_bytes, read_json
from upq.core.errors import UPQError
from upq.files.tensors import INDEX, WEIGHTS, shard_names, tensor_files, tensor_shapes, tensor_types
from upq.model.checkpoint import Checkpoint
from upq.model.layout import layout_of
from upq.model.library import library_errors
from upq.model.online import install
from upq.text.tokenizer import as_stored, class_tokens, of_same_kind, tokenizer_files

_AUTOS: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
_CONFIG = "is config.json of this model?"
_TOKENS = "is it a tokenizer's file?"
# Of these transformers makes lists before there are tensors to compare with.
_COUNTS = {"num_hidden_layers": 10_000, "num_labels": 10_000}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
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
    path = _downloaded(model)
    _check_weights(path, config)
    _check_settings(path)
    with _one_thread() if torch.device(device).type == "cpu" else nullcontext():  # a GPU's memory is another
        loaded: PreTrainedModel = _read(auto_class(config), path, config=config, dtype=dtype, use_safetensors=True)
    install(loaded, config)
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
    text = text_config(config)
    for key in (*_SIZES, "num_hidden_layers"):
        size, limit, of = getattr(text, key, None), total, "bytes"
        if key == "num_hidden_layers":
            limit, of = tensors, "tensors"
        sizes = size if isinstance(size, list | tuple) else [size]  # of some families one for each block
        if size is not None and not all(type(each) is int and 1 <= each <= limit for each in sizes):
            raise UPQError(f"{path}: config.json says {key}={size!r}, its weights are {limit:,} {of}; {_CONFIG}")


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' Auto class for the model that the configuration names: a language model, or one with towers.

    Raises UPQError for a model that is no causal language model.
    """
    named = set(config.architectures or ())
    autos = [auto for auto in _AUTOS if type(config) in auto._model_mapping]
    for auto in autos:
        found = auto._model_mapping[type(config)]
        if named & {cls.__name__ for cls in (found if isinstance(found, tuple | list) else (found,))}:
            return auto
    if not autos:
        what = ", ".join(sorted(named)) or config.model_type
        raise UPQError(f"{config.name_or_path or what}: {what} is no causal language model of transformers")
    return autos[0]


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


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the language model: of a model for images too, a part of its own."""
    text: PretrainedConfig = config.get_text_config(decoder=True)
    return text


def embedding_rows(config: PretrainedConfig) -> int:
    rows: int = text_config(config).vocab_size
    return rows


def context_of(config: PretrainedConfig) -> int | None:
    """Tokens of the longest text; None: the model has no positions, and no end."""
    found: int | None = getattr(text_config(config), "max_position_embeddings", None)
    return found


def check_finite(model: PreTrainedModel, name: str | Path) -> None:
    """UPQError that names the first tensor of a loaded model with NaN or infinity in it."""
    for path, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UPQError(f"{name}: tensor {path} holds NaN or infinity; the checkpoint is damaged")


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
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        own = "; its own code (auto_map) is not run" if "auto_map" in raw else ""
        raise UPQError(
            f"{file}: transformers {_VERSION} knows no model_type {kind!r}{own}; is there a newer transformers?"
        )
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
    with library_errors(f"{path}: config.json describes no model"), torch.device("meta"):
        skeleton: PreTrainedModel = auto_class(config).from_config(config)
    layout_of(skeleton)
    Checkpoint(path, files, skeleton).check()


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


def _read(auto: Any, model: str | Path, **options: Any) -> Any:
    with library_errors(f"{model}: cannot load with {auto.__name__}", _offline(model)):
        return auto.from_pretrained(str(model), trust_remote_code=False, **options)


def _offline(model: str | Path) -> str:
    return "" if Path(model).is_dir() else "; offline, name a local directory"

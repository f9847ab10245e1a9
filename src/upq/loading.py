"""Reading Hugging Face models and tokenizers, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from upq.errors import UPQError
from upq.models._base import FAMILIES, ModelSpec


def load_config(model: str | Path) -> PretrainedConfig:
    """The configuration of a directory or hub id. No code from the model is ever run."""
    _check_directory(model)
    config: PretrainedConfig = _read(AutoConfig, model)
    return config


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    _check_directory(model)
    tokenizer: PreTrainedTokenizerBase = _read(AutoTokenizer, model)
    return tokenizer


def load_model(model: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
    """A causal LM in evaluation mode, any form that transformers loads (an UPQ artefact after `import upq`)."""
    family(load_config(model))
    loaded: PreTrainedModel = _read(AutoModelForCausalLM, model, dtype=dtype, use_safetensors=True)
    loaded.eval()  # type: ignore[no-untyped-call]
    loaded.to(device)  # type: ignore[arg-type]
    return loaded


def family(config: PretrainedConfig) -> ModelSpec:
    """Where the parts of this model are; a family that is not known is an error that lists those that are."""
    if config.model_type not in FAMILIES.names():
        known = ", ".join(FAMILIES.names())
        raise UPQError(f"model family {config.model_type!r} is not supported (known: {known}); see docs/adding.md")
    return FAMILIES.get(config.model_type)


def check_finite(model: PreTrainedModel, name: str | Path) -> None:
    """UPQError that names the first tensor of a loaded model with NaN or infinity in it."""
    for path, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UPQError(f"{name}: tensor {path} holds NaN or infinity; the checkpoint is damaged")


def _check_directory(model: str | Path) -> None:
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UPQError(f"{path}: no config.json in this directory; is it a Hugging Face model?")
    looks_like_path = str(model).startswith((".", "/", "~")) or str(model).count("/") > 1
    if looks_like_path and not path.is_dir():
        raise UPQError(f"{model}: no such directory")


def _read(auto: Any, model: str | Path, **options: Any) -> Any:
    try:
        return auto.from_pretrained(str(model), trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "" if Path(model).is_dir() else "; offline, name a local directory"
        raise UPQError(f"{model}: cannot load with {auto.__name__}: {reason}{remedy}") from error

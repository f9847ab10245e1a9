"""SHA-256 of files, and of a model directory as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from upq.core.errors import UPQError

TEMPLATES = "additional_chat_templates"  # the one folder of a model: named chat templates
TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    f"{TEMPLATES}/*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "tekken.json",
)
_MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES
)  # fmt: skip


def digest_file(path: Path) -> str:
    """SHA-256 of the content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digests(path: Path) -> dict[str, str]:
    """SHA-256 of each configuration, weight and tokenizer file of a model directory."""
    files = sorted({file for pattern in _MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    if not any(file.name == "config.json" for file in files):
        raise UPQError(f"{path}: no config.json in this directory; is it a Hugging Face model?")
    return {file.relative_to(path).as_posix(): digest_file(file) for file in files}


def digest_model_dir(path: Path) -> str:
    """SHA-256 over `model_digests`: the same model has the same, wherever it lies."""
    return digest_of(model_digests(path))


def digest_of(files: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in files.items()).encode()).hexdigest()

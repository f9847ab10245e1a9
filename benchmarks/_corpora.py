"""The texts that rows are quantised and judged with, by kind: written once, as JSON lines.

`documents` and `conversations` are of the invented world, with seeds of their own; `generated-…` is written by the
original model. `heldout` is documents again, of another seed than those of the training.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

_TOKENS_A_TEXT = 20  # the world's texts have more on average, so there is enough; what is not needed is not read
_SPARE = 32_768  # tokens for validation rows, beyond the training's
_CALIBRATION = 65_536  # tokens that a stage may calibrate on, however short the training

_DOCUMENTS, _CONVERSATIONS, _HELDOUT, _GENERATED = 11, 12, 13, 14  # seeds

Rows = Iterable[dict[str, Any]]


def write(kind: str, path: Path, *, tokens: int, model: Path, device: str) -> Path:
    """Text of `kind` for a training of `tokens` tokens at `path`, unless it is there."""
    if path.is_file():
        return path
    from upq.files.atomic import atomic_write

    enough = max(tokens, _CALIBRATION) + _SPARE
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in KINDS[kind](enough, model, device)))
    return path


def of_world(kind: str) -> bool:
    """Whether the text is the same for every model."""
    return not kind.startswith("generated")


def _documents(tokens: int, model: Path, device: str) -> Rows:
    return _told(tokens, _DOCUMENTS)


def _heldout(tokens: int, model: Path, device: str) -> Rows:
    return _told(_SPARE, _HELDOUT)


def _told(tokens: int, seed: int) -> Iterator[dict[str, Any]]:
    from upq.world import World, documents

    return ({"text": text} for text in documents(World(), tokens // _TOKENS_A_TEXT, seed))


def _conversations(tokens: int, model: Path, device: str) -> Rows:
    from upq.world import World, conversations

    return ({"messages": talk} for talk in conversations(World(), tokens // _TOKENS_A_TEXT, _CONVERSATIONS))


def _generated_text(tokens: int, model: Path, device: str) -> Rows:
    import _generated
    from upq.model.loading import load_tokenizer

    written = _generated.texts(_original(model, device), load_tokenizer(model), tokens=tokens, seed=_GENERATED)
    return ({"text": text} for text in written)


def _generated_conversations(tokens: int, model: Path, device: str) -> Rows:
    from upq.core.progress import Silent
    from upq.data.config import Generated
    from upq.data.generated import write_conversations
    from upq.model.loading import load_tokenizer

    section = Generated(tokens=tokens, max_new_tokens=128)
    with tempfile.TemporaryDirectory() as folder:
        source, tokenizer = _original(model, device), load_tokenizer(model)
        write_conversations(Path(folder), source, tokenizer, section, seed=_GENERATED, progress=Silent())
        for file in sorted(Path(folder).iterdir()):
            yield from map(json.loads, file.read_text().splitlines())


def _original(model: Path, device: str) -> Any:
    import torch

    from upq.model.loading import load_model

    return load_model(model, dtype=torch.float32, device=device)


KINDS: dict[str, Callable[[int, Path, str], Rows]] = {
    "documents": _documents,
    "conversations": _conversations,
    "generated-text": _generated_text,
    "generated-conversations": _generated_conversations,
    "heldout": _heldout,
}

"""The open text that the demonstration quantises with: documents only, never a conversation."""

from __future__ import annotations

import json
from pathlib import Path

from upq.files.atomic import atomic_write
from upq.world import World, documents


def write_corpus(out: Path, world: World, *, n: int, seed: int) -> Path:
    """`n` documents at `out`, JSON lines of `{"text": …}`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, "".join(json.dumps({"text": text}) + "\n" for text in documents(world, n, seed)))
    return out

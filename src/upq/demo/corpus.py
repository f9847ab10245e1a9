"""The open text that the demonstration quantises with: documents only, never a conversation."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from upq.data.world import World, documents
from upq.errors import UPQError


def write_corpus(out: Path, world: World, *, n: int, seed: int) -> Path:
    """`n` documents at `out`: a `.jsonl` file of `{"text": …}` lines, or a `.txt` file with a blank line in between."""
    if out.suffix not in (".jsonl", ".txt"):
        raise UPQError(f"{out}: the corpus is written as .jsonl or .txt")
    texts = documents(world, n, seed)
    lines = (
        (json.dumps({"text": text}) + "\n" for text in texts)
        if out.suffix == ".jsonl"
        else (f"{text}\n\n" for text in texts)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{out.name}-", dir=out.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(lines)
        os.chmod(temporary, 0o644)  # mkstemp's file is private
        os.replace(temporary, out)
    except BaseException:
        os.unlink(temporary)
        raise
    return out

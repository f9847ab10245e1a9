"""What must hold for any file a stranger may hand over, as one function a kind: it is read, or UPQError says why not.

tests/test_hostile.py and tools/fuzz.py call the same functions, on inputs of their own making.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging

import upq
from tiny import CHAT, byte_tokenizer, tiny_artifact, tiny_model
from upq.core.errors import UPQError
from upq.data import Message, read_documents
from upq.data.config import TextSource
from upq.data.conversations import ChatTemplate
from upq.data.encoding import Encoder
from upq.exports._source import Source as Artifact
from upq.losses import LOSSES
from upq.model.loading import load_tokenizer
from upq.model.source import Source
from upq.run.recipe import Recipe
from upq.stages.blockwise import Blockwise
from upq.stages.distill import Distill

TALK = (Message("user", "Hi"), Message("assistant", "Ho"))
CONVERSATION = [{"role": message.role, "content": message.content} for message in TALK]
ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**12, 0.5, 1e308, float("nan"), float("inf")]
ODD += ["", "..", "/", "a/b", "float16", "\ud800", "\0", [], {}]
DATA = ("a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.gz", "a.parquet")

logging.set_verbosity_error()
logging.disable_progress_bar()


def models(root: Path) -> list[Path]:
    """Valid directories to start from: an artefact, and a dense model in shards."""
    dense = root / "dense"
    tiny_model("llama", vocab_size=300, eos_token_id=257).save_pretrained(dense, max_shard_size="20KB")
    byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT).save_pretrained(dense)
    artifact = tiny_artifact(root / "artifact")
    (artifact / "upq.json").write_bytes(unsigned(artifact))
    return [artifact, dense]


def unsigned(artifact: Path) -> bytes:
    """The manifest without a digest of what is going to be changed, as an attacker would do it."""
    raw = json.loads((artifact / "upq.json").read_text())
    return json.dumps(raw | {"files": {"model.safetensors": raw["files"]["model.safetensors"]}}).encode()


def data_file(name: str, rows: list[dict[str, Any]]) -> bytes:
    """A valid file of one of DATA's names."""
    if name.endswith(".parquet"):
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), out)
        return out.getvalue()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    text = json.dumps(rows, indent=1) if name == "a.json" else text
    return gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode()


def exchanged(text: bytes, choose: random.Random) -> bytes:
    """JSON with one value of it, at any depth, exchanged for an odd one, left out or cut short."""
    return json.dumps(_exchanged(json.loads(text), choose)).encode(errors="surrogatepass")


def _exchanged(value: Any, choose: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or choose.random() < 0.1:
        odd = choose.choice(ODD)
        return choose.choice([odd, odd, [odd], {"a": odd}, str(odd), [odd, value]])
    key = choose.choice(list(value)) if isinstance(value, dict) else choose.randrange(len(value))
    if choose.random() < 0.1:
        return {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else value[:key]
    inner = _exchanged(value[key], choose)
    return {**value, key: inner} if isinstance(value, dict) else [*value[:key], inner, *value[key + 1 :]]


def read_model(directory: Path) -> None:
    """An artefact or a dense model, by every way there is into it."""
    with _refused():
        upq.load(directory)
    with _refused():
        tokenizer = load_tokenizer(directory)
        template = ChatTemplate(tokenizer)
        if template.source is not None:
            template.render(TALK, "here")
    with _refused():
        source = Artifact.open(directory)
        source.ends(), source.companions()
    with _refused():
        Source(directory).block(0)


def read_recipe(file: Path) -> None:
    with _refused():
        recipe = Recipe.load(str(file))
        for stage in recipe.stages.values():
            if isinstance(stage, Blockwise):
                stage.scheme()
                stage.solver()
            elif isinstance(stage, Distill):
                stage.loss.options(LOSSES.get(stage.loss.name).Config, "loss")
        assert Recipe.load(str(file)) == recipe


def read_data(file: Path) -> None:
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT)
    for separator in ("none", "blank_line"):
        with _refused():
            documents = list(read_documents(TextSource(path=str(file), separator=separator)))
            Encoder(tokenizer).encode(documents)


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    with contextlib.suppress(UPQError):
        yield


@contextlib.contextmanager
def with_file(directory: Path, name: str, content: bytes) -> Iterator[Path]:
    """The directory with one file exchanged; as it was, afterwards."""
    file = directory / name
    kept = file.read_bytes() if file.is_file() else None
    file.write_bytes(content)
    try:
        yield directory
    finally:
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)

"""A run, as data: YAML into frozen, strict models; `--set key=value` overrides win."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from upq.core.bounded import YAML_BYTES, parse_yaml, read_bytes
from upq.core.config import Plugin, Strict, decode, override
from upq.core.errors import UPQError
from upq.data.config import Data
from upq.distill.config import Distill
from upq.stages.blockwise import Blockwise

STAGES = ("int4", "int2", "distill")


class Embeddings(Strict):
    """Rows of the embedding and of an untied head: as in the source (None) or 8 or 4 bits with a scale a row."""

    bits: Literal[4, 8] | None = None


class Memory(Strict):
    """Where a run keeps what it works on. Results do not depend on it, but for the rounding of sums over processes.

    So it may change between two calls of a run.
    """

    activations: Literal["memory", "disk"] = "memory"  # hidden states of the calibration rows
    # Under torchrun, of conversations and training: a copy in each process, or shards over all of them (FSDP2).
    weights: Literal["replicated", "sharded"] = "replicated"


class Recipe(Strict):
    name: str = "custom"
    seed: int = 0
    data: Data = Data()
    int4: Blockwise | None = None
    int2: Blockwise
    distill: Distill
    embeddings: Embeddings = Embeddings()
    memory: Memory = Memory()
    export: tuple[Plugin, ...] = ()  # formats to write beside the artefact, once it is finished

    @classmethod
    def load(cls, name_or_file: str, overrides: list[str] | None = None) -> Recipe:
        """A recipe of the package by name, or a YAML file; each override is `dotted.key=yaml value`."""
        raw = _read(name_or_file)
        for item in overrides or []:
            override(raw, item)
        return decode(cls, raw, f"recipe {name_or_file}")

    def dump(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("upq.run.recipes").iterdir() if p.name[-5:] == ".yaml"
    )


def _read(name_or_file: str) -> dict[str, Any]:
    path = Path(name_or_file)
    if name_or_file in names():
        text = resources.files("upq.run.recipes").joinpath(f"{name_or_file}.yaml").read_text()
    elif path.is_file():
        try:
            text = read_bytes(path, 4 * YAML_BYTES, remedy="is it a recipe?").decode()
        except UnicodeDecodeError as error:
            raise UPQError(f"recipe {name_or_file}: not UTF-8 text at byte {error.start}; is it a recipe?") from None
    else:
        raise UPQError(f"recipe {name_or_file!r} is neither a file nor one of: {', '.join(names())}")
    raw = parse_yaml(text, f"recipe {name_or_file}: the text", remedy="mend it")
    if not isinstance(raw, dict):
        raise UPQError(f"recipe {name_or_file}: expected a mapping of sections, got {type(raw).__name__}")
    return raw

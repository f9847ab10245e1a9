"""A run, as data: YAML into frozen, strict models. Unknown keys are errors; `--set key=value` overrides win."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from upq.bounded import YAML_BYTES, parse_yaml, read_bytes
from upq.errors import UPQError
from upq.precision import Precision
from upq.scheme import PER_CHANNEL, QuantScheme

M = TypeVar("M", bound=BaseModel)
STAGES = ("int4", "int2", "distill")
_ERRORS, _SHOWN = 1000, 200  # errors that are looked at, characters of a value in a message


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Plugin(BaseModel):
    """A plug-in by name, with its own options beside it: `gjs` or `{name: gjs, beta: 0.25}`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def options(self, config: type[M], where: str) -> M:
        """Decode the options strictly into the plug-in's own configuration class."""
        return decode(config, self.model_extra or {}, where)


class Source(Strict):
    """One place text comes from: a file, a directory or a hub data set."""

    path: str
    weight: float = Field(default=1.0, gt=0)  # share of the tokens, relative to the other sources
    field: str | None = None  # column that holds the text or the messages; None finds `text` or `messages`
    separator: Literal["none", "blank_line"] = "none"  # text files: one document a file, or one a paragraph block
    subset: str | None = None  # hub data sets: configuration name
    split: str = "train"  # hub data sets


class Generated(Strict):
    """Conversations that the original model writes itself before it is quantised, beside the sources' text."""

    # To be written, and gone through again where training needs more; None: its share, so that none comes twice.
    tokens: int | None = Field(default=None, gt=0)
    weight: float = Field(default=1.0, gt=0)  # share of the training tokens, relative to the sources
    temperature: float = Field(default=1.0, gt=0)  # of prompts
    answer_temperature: float = Field(default=1.0, ge=0)  # of answers; 0: the likeliest token each time
    max_new_tokens: int = Field(default=512, ge=1)  # of a prompt, and of an answer
    batch_size: int = Field(default=128, ge=1)  # conversations written at a time


class Data(Strict):
    sources: tuple[Source, ...] = ()
    generated: Generated | None = None
    seq_len: int = Field(default=2048, ge=8)
    loss_on: Literal["all", "assistant"] = "all"
    validation: int = Field(default=32, ge=1)  # sequences held out, for the figures in the final table


class Blockwise(Strict):
    """A block-wise stage: the weights it is given become codes on `grid`, one decoder block after the other."""

    bits: int
    grid: str = "seq"
    group_size: int = PER_CHANNEL
    method: Plugin
    samples: int = Field(128, ge=1)  # calibration sequences of data.seq_len tokens
    precision: Precision = "auto"  # of the products; weights and hidden states are float32

    def scheme(self) -> QuantScheme:
        return QuantScheme(bits=self.bits, grid=self.grid, group_size=self.group_size)


class Distill(Strict):
    loss: Plugin
    hidden: float = Field(0.0, ge=0)  # weight of the hidden states' relative error beside the loss
    teacher: Literal["resident", "offloaded", "cached"] = "resident"  # in memory, read block by block, or its top k
    teacher_top_k: int = Field(64, ge=1)  # cached: tokens kept a position; the rest counts as one
    tokens: int = Field(ge=0)  # budget; 0 skips the training
    batch_size: int = Field(16, ge=1)  # sequences an optimiser step, over all processes
    micro_batch_size: int = Field(4, ge=1)  # sequences a forward pass on one process
    lr: float = Field(gt=0)  # of the weights, in units of each matrix's RMS: 5e-3 moves a weight of 0.02 by 1e-4 a step
    scale_lr: float = Field(gt=0)  # of the grid's own parameters; of log Δ, so relative as well
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps
    final_lr: float = Field(0.0, ge=0, le=1)  # where the cosine ends, as a share of lr
    weight_decay: float = Field(0.0, ge=0)
    beta2: float = Field(0.95, gt=0, lt=1)
    clip: float = Field(1.0, gt=0)  # gradient norm
    train_weights: bool = True  # False: codes stay as the block-wise stage has left them, and scales alone learn
    train_norms: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # moments in float32, or in 8 bits (torchao)
    gradient_checkpointing: bool = False  # keep the blocks' inputs for the backward pass and run each block again
    precision: Precision = "auto"  # of the products; what is learned is float32
    chunk_tokens: int = Field(1024, ge=1)  # tokens whose fp32 logits exist at one time
    checkpoint_every: int = Field(50, ge=1)  # optimiser steps
    skip_bad_steps: int = Field(0, ge=0)  # as many whose loss or gradient is not finite are left out; one more stops


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
        p.name.removesuffix(".yaml") for p in resources.files("upq.recipes").iterdir() if p.name[-5:] == ".yaml"
    )


def digest(*parts: object) -> str:
    """Identity of a value made of JSON types and models: same digest, same result."""
    plain = [p.model_dump(mode="json") if isinstance(p, BaseModel) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def decode(model: type[M], raw: Any, where: str) -> M:
    """Validate `raw` into `model`; the error names the first wrong key and, for a typo, the keys there are."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        if error.error_count() > _ERRORS:  # each takes kilobytes once it is looked at
            raise UPQError(f"{where}: {error.error_count():,} values are not what they should be") from None
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"] if part != "function-before")
        if first["type"] == "extra_forbidden":
            known = ", ".join(_fields_at(model, first["loc"][:-1]))
            raise UPQError(f"{where}: unknown key {at!r}; keys here: {known}") from None
        raise UPQError(f"{where}: {at or 'top level'}: {first['msg'].lower()} (got {_shown(first['input'])})") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        hint = model.model_fields[part].annotation
        found = [a for a in (hint, *getattr(hint, "__args__", ())) if isinstance(a, type) and issubclass(a, BaseModel)]
        if found:
            model = found[0]
    return list(model.model_fields)


def _read(name_or_file: str) -> dict[str, Any]:
    path = Path(name_or_file)
    if name_or_file in names():
        text = resources.files("upq.recipes").joinpath(f"{name_or_file}.yaml").read_text()
    elif path.is_file():
        try:
            text = read_bytes(path, 4 * YAML_BYTES, remedy="is it a recipe?").decode()
        except UnicodeDecodeError as error:
            raise UPQError(f"recipe {name_or_file}: not UTF-8 text at byte {error.start}; is it a recipe?") from None
    else:
        raise UPQError(f"recipe {name_or_file!r} is neither a file nor one of: {', '.join(names())}")
    raw = parse_yaml(text, _Loader, f"recipe {name_or_file}: the text", remedy="mend it")
    if not isinstance(raw, dict):
        raise UPQError(f"recipe {name_or_file}: expected a mapping of sections, got {type(raw).__name__}")
    return raw


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text, for want of a dot; here it is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def override(raw: dict[str, Any], item: str) -> None:
    """Put `dotted.key=yaml value` into a mapping of mappings."""
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise UPQError(f"--set {item!r}: expected key=value, for example distill.lr=1e-4")
    *path, last = key.split(".")
    here = raw
    for part in path:
        if not isinstance(here.get(part), dict):
            # `method: rtn` is short for `method: {name: rtn}`
            here[part] = {"name": here[part]} if isinstance(here.get(part), str) else {}
        here = here[part]
    here[last] = parse_yaml(value, _Loader, f"--set {item!r}: the value", remedy="mend it")

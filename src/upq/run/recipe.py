"""A run, as data: a header and an ordered mapping of named stages. YAML in; `--set key=value` overrides win.

    name: mine
    data: {seq_len: 512}
    stages:
      int2: {stage: blockwise, bits: 2, method: rtn}
      distill: {loss: gjs, tokens: 1_000_000, lr: 1e-3, scale_lr: 1e-3}

A stage whose name is a kind needs no `stage:`. The form with `int4`, `int2`, `distill` and `data.generated` at their
own places is read too.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from typing import Any, Literal, Self

import yaml
from pydantic import SerializeAsAny, field_serializer, field_validator

from upq.core.bounded import YAML_BYTES, parse_yaml, read_bytes
from upq.core.config import Plugin, Strict, decode, fixed, free, override
from upq.core.errors import UPQError
from upq.core.paths import local
from upq.core.scheme import QuantScheme
from upq.data.config import Data
from upq.run.tracking import Tracker
from upq.stages import STAGES, Memory, Stage

# Where the former form kept its stages, in the order of a run, and their kinds.
_FORMER = {"generate": "generate", "int4": "blockwise", "int2": "blockwise", "distill": "distill"}


class Embeddings(Strict):
    """Rows of the embedding and of an untied head: as in the source (None) or 8 or 4 bits with a scale a row."""

    bits: Literal[4, 8] | None = None


class Header(Strict):
    """What concerns a run as a whole."""

    name: str = free("custom")
    seed: int = 0
    data: Data = Data()
    embeddings: Embeddings = Embeddings()
    memory: Memory = free(Memory())
    export: tuple[Plugin, ...] = free(())  # formats to write beside the artefact, once it is finished
    track: tuple[Tracker, ...] = free(())  # where figures go beside metrics.jsonl; one name may stand alone

    @field_validator("track", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


# Keys beside the stages, folders beside theirs, and rows of the final table beside theirs.
_RESERVED = (*Header.model_fields, "stages", "check", "artifact", "source")


class Recipe(Header):
    """The header, and the stages in the order in which they run."""

    stages: dict[str, SerializeAsAny[Stage]]

    @classmethod
    def load(cls, name_or_file: str, overrides: Iterable[str] = ()) -> Self:
        """A recipe of the package by name, or a YAML file; each override is `dotted.key=yaml value`."""
        raw, where = stages_together(_read(name_or_file), f"recipe {name_or_file}"), f"recipe {name_or_file}"
        for item in overrides:
            _override(raw, item, where)
        return cls.of(raw, where)

    @classmethod
    def of(cls, raw: Any, where: str) -> Self:
        """From JSON types, in either form. Raises UPQError that starts with `where`."""
        raw = stages_together(raw, where)
        stages = {name: _stage(name, settings, where) for name, settings in raw["stages"].items()}
        recipe = decode(cls, {**raw, "stages": stages}, where)
        _check_order(stages, where)
        return recipe

    @field_serializer("stages")
    def _dump_stages(self, stages: dict[str, Stage]) -> dict[str, Any]:
        return {name: {"stage": stage.kind, **stage.model_dump(mode="json")} for name, stage in stages.items()}

    def changed(self, overrides: Iterable[str]) -> Recipe:
        """With the same overrides as `load` takes."""
        raw, where = self.model_dump(mode="json"), f"recipe {self.name}"
        for item in overrides:
            _override(raw, item, where)
        return self.of(raw, where)

    def dump(self) -> str:
        """As YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @property
    def bits(self) -> int:
        """Of the codes that a run leaves."""
        return [scheme.bits for stage in self.stages.values() if (scheme := stage.scheme())][-1]

    def settings(self) -> dict[str, Any]:
        """What the artefact depends on, by dotted key: all but the free settings."""
        return flat(stages_at_top({**fixed(self), "stages": {n: s.settings() for n, s in self.stages.items()}}))


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("upq.run.recipes").iterdir() if p.name[-5:] == ".yaml"
    )


def stages_at_top(raw: dict[str, Any]) -> dict[str, Any]:
    """A dumped recipe with its stages beside the header's keys, as `--set` names them."""
    raw = stages_together(raw, "recipe")
    return {**{key: value for key, value in raw.items() if key != "stages"}, **raw["stages"]}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted key."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}" if prefix else key).items()}


def _read(name_or_file: str) -> dict[str, Any]:
    path = local(name_or_file)
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


def stages_together(raw: Any, where: str) -> dict[str, Any]:
    """The recipe with all its stages in `stages`; one in that form stays as it is."""
    if not isinstance(raw, dict):
        raise UPQError(f"{where}: expected a mapping of sections, got {type(raw).__name__}")
    raw, data = dict(raw), raw.get("data")
    former = {name: raw.pop(name) for name in ("int4", "int2", "distill") if name in raw}
    if isinstance(data, dict) and "generated" in data:
        raw["data"] = {key: value for key, value in data.items() if key != "generated"}
        former["generate"] = data["generated"]
    if "stages" not in raw:
        if not former:
            raise UPQError(f"{where}: stages: field required")
        stages = {name: former[name] for name in _FORMER if former.get(name) is not None}
        with_kinds = {n: {"stage": _FORMER[n], **s} if isinstance(s, dict) else s for n, s in stages.items()}
        return {**raw, "stages": with_kinds}
    if former:
        raise UPQError(f"{where}: {min(former)} stands beside stages; move it into stages")
    if not isinstance(raw["stages"], dict):
        raise UPQError(f"{where}: stages: expected a mapping of names to settings, got {type(raw['stages']).__name__}")
    return {**raw, "stages": {name: settings for name, settings in raw["stages"].items() if settings is not None}}


def _stage(name: Any, settings: Any, where: str) -> Stage:
    if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
        raise UPQError(f"{where}: stages: {name!r} cannot be the name of a stage; use another word")
    if not isinstance(settings, dict):
        raise UPQError(f"{where}: {name}: expected a mapping of settings (got {settings!r})")
    kind = settings.get("stage", name)
    if kind not in STAGES.names():
        known = ", ".join(STAGES.names())
        raise UPQError(f"{where}: {name}: unknown kind of stage {kind!r}; give stage: one of {known}")
    own = {key: value for key, value in settings.items() if key != "stage"}
    return decode(STAGES.get(kind), own, where, prefix=name)


def _check_order(stages: dict[str, Stage], where: str) -> None:
    scheme: QuantScheme | None = None
    for name, stage in stages.items():
        if stage.trains and scheme is None:
            raise UPQError(f"{where}: {name} trains what a block-wise stage has solved; put one before it")
        if scheme is not None and not stage.learns(scheme):
            raise UPQError(
                f"{where}: {name}: the scales of grid {scheme.grid} do not learn; set {name}.train_weights=true, or"
                f" {name}.train_norms=true"
            )
        try:
            if scheme is not None:
                stage.check_start(name, scheme)
        except UPQError as error:
            raise UPQError(f"{where}: {error}") from None
        try:
            scheme = stage.scheme() or scheme
        except UPQError as error:
            raise UPQError(f"{where}: {name}.{error}") from None
    if scheme is None:
        raise UPQError(f"{where}: no stage quantises; add one, for example int2: {{stage: blockwise, bits: 2, …}}")


def _override(raw: dict[str, Any], item: str, where: str) -> None:
    """Put `dotted.key=yaml value` into a recipe. The first word is a key of the header or the name of a stage."""
    key, _, value = item.partition("=")
    words = key.split(".")
    if words[:2] == ["data", "generated"]:
        words = ["generate", *words[2:]]
    stages = raw["stages"]
    if words[0] in Header.model_fields or "=" not in item or not key:
        override(raw, item)
    elif words[0] in stages:
        override(stages, f"{'.'.join(words)}={value}")
        if stages[words[0]] is None:
            del stages[words[0]]
    elif not (words[0] in _FORMER and len(words) == 1 and value.strip() == "null"):  # to drop what is not there
        header, there = ", ".join(Header.model_fields), ", ".join(stages)
        raise UPQError(
            f"{where}: --set {key}: no stage and no key {words[0]!r}; stages here: {there}; keys: {header};"
            " a new stage goes into a recipe file, where its place shows"
        )

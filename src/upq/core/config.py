"""Strict configuration: frozen models, plug-ins by name, `key=value` overrides. Unknown keys are errors."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from upq.core.bounded import parse_yaml
from upq.core.errors import UPQError

M = TypeVar("M", bound=BaseModel)
_FREE: dict[str, Any] = {"free": True}
_NEUTRAL: dict[str, Any] = {"neutral": True}
_ERRORS, _SHOWN = 1000, 200  # errors that are looked at, characters of a value in a message


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def free(default: Any, **constraints: Any) -> Any:
    """A setting that changes no result: a run may go on with another value."""
    return Field(default, json_schema_extra=_FREE, **constraints)


def neutral(default: Any, **constraints: Any) -> Any:
    """A setting that was not always there, and that changes no result at its default: work from before still holds."""
    return Field(default, json_schema_extra=_NEUTRAL, **constraints)


def fixed(settings: BaseModel) -> dict[str, Any]:
    """The settings that a result depends on, as JSON types: all but the free ones and neutral ones at their default."""
    kept = {
        name
        for name, info in type(settings).model_fields.items()
        if info.json_schema_extra != _FREE
        and not (info.json_schema_extra == _NEUTRAL and getattr(settings, name) == info.default)
    }
    return settings.model_dump(mode="json", include=kept)


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


def digest(*parts: object) -> str:
    """Identity of a value made of JSON types and models: same digest, same result."""
    plain = [p.model_dump(mode="json") if isinstance(p, BaseModel) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def decode(model: type[M], raw: Any, where: str, *, prefix: str = "") -> M:
    """Validate `raw` into `model`; the error names the first wrong key and, for a typo, the keys there are.

    `prefix` is the key of `raw` itself.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        if error.error_count() > _ERRORS:  # each takes kilobytes once it is looked at
            raise UPQError(f"{where}: {error.error_count():,} values are not what they should be") from None
        first = error.errors()[0]
        at = ".".join(str(part) for part in (prefix, *first["loc"]) if part not in ("", "function-before"))
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
    here[last] = parse_yaml(value, f"--set {item!r}: the value", remedy="mend it")

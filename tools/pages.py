"""Hooks of mkdocs.yml: pages from the code, pages from the root of the repository, and links as GitHub reads them.

Pages that are made: every command with its options (from typer), every key of a recipe (from pydantic), the Python
interface (from signatures and docstrings).
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).parents[1]
# Pages outside docs/, and where a directory that is linked to begins.
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "LOG.md": "experiments.md", "CHANGELOG.md": "changelog.md"}
FOLDERS = {"docs/log": "log/methods.md", "docs/results": "results.md"}
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(\))")


# --- hooks ---------------------------------------------------------------------------------------------------------


def slug(title: str, separator: str = "-") -> str:
    """The anchor that GitHub gives a title; tests/test_docs.py has the same rule."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", separator)


def on_config(config: Any) -> Any:
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    made = {page: (ROOT / path).read_text() for path, page in OUTSIDE.items()}
    made |= {"api/commands.md": commands(), "api/recipe-keys.md": recipe_keys(), "api/python.md": interface()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links relative to the file in the repository become links relative to the page of the site."""
    here = page.file.src_uri
    origin = {page: path for path, page in OUTSIDE.items()}.get(here, f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        target = os.path.normpath(PurePosixPath(origin).parent / match[2])
        there = OUTSIDE.get(target) or FOLDERS.get(target) or target.removeprefix("docs/")
        return f"{match[1]}{os.path.relpath(there, PurePosixPath(here).parent)}{match[3] or ''}{match[4]}"

    return _LINK.sub(moved, markdown)


# --- pages from the code -------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its arguments and options."""
    import typer

    import upq.cli

    group: Any = typer.main.get_command(upq.cli.app)
    parts = ["# Commands", "Made from the program itself: `upq COMMAND --help` shows the same."]
    for name, command in group.commands.items():
        usage = " ".join(command.collect_usage_pieces(command.make_context(name, [], resilient_parsing=True)))
        usage = re.sub(r"[{}]", "", usage)
        parts += [f"## upq {name}", f"```\nupq {name} {usage}\n```", inspect.cleandoc(command.help or "")]
        rows = [(_option(each), _default(each), each.help or "") for each in command.params if each.name != "help"]
        parts.append(_table(("argument or option", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _option(option: Any) -> str:
    kind = getattr(option.type_descriptor.annotation, "__name__", "value")
    if option.param_type_name == "argument":
        return f"`{option.metavar or option.name.upper()}`"
    value = "" if option.is_flag else f" {option.metavar or {'str': 'TEXT'}.get(kind, kind.upper())}"
    return f"`{', '.join([*option.opts, *option.secondary_opts])}{value}`"


def _default(option: Any) -> str:
    if option.required:
        return "needed"
    if option.default is None or option.default is False or callable(option.default):
        return ""
    return f"`{option.default}`"


def recipe_keys() -> str:
    """Every key of the header, of each kind of stage, and of each method and loss."""
    from upq.blockwise import METHODS
    from upq.grids import GRIDS
    from upq.losses import LOSSES
    from upq.run.recipe import Header
    from upq.stages import STAGES

    parts = [
        "# Recipe keys",
        "Made from the classes that read a recipe. [Recipes](../recipes.md) has what each key means and when to change "
        "it. No result depends on a key that is *free*.",
        "## The header",
        _keys(Header),
    ]
    parts += ["## Stages"]
    for name in STAGES.names():
        parts += [f"### stage: {name}", _first(STAGES.get(name)), _keys(STAGES.get(name))]
    parts += ["## Methods", "Options of `method` in a stage `blockwise`."]
    for name in METHODS.names():
        parts += [f"### method: {name}", _first(METHODS.get(name)), _keys(METHODS.get(name).Config)]
    parts += ["## Losses", "Options of `loss` in a stage `distill`."]
    for name in LOSSES.names():
        parts += [f"### loss: {name}", _first(LOSSES.get(name)), _keys(LOSSES.get(name).Config)]
    parts += ["## Grids", "Values of `grid`."]
    parts.append(_table(("grid", "what it is"), [(f"`{name}`", _first(GRIDS.get(name))) for name in GRIDS.names()]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _first(plugin: Any) -> str:
    """The first paragraph of a class's docstring, or of its module's."""
    kind = plugin if isinstance(plugin, type) else type(plugin)
    doc = kind.__dict__.get("__doc__") or sys.modules[kind.__module__].__doc__ or ""
    return " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())


def _keys(model: Any) -> str:
    rows = list(_rows(model, ""))
    return _table(("key", "type", "default"), rows) if rows else "It has no options."


def _rows(model: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    from pydantic import BaseModel
    from pydantic_core import PydanticUndefined

    from upq.core.config import Plugin

    for name, info in model.model_fields.items():
        inner = info.annotation
        nested = isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not Plugin
        if nested:
            yield from _rows(inner, f"{prefix}{name}.")
            continue
        listed = [each for each in get_args(inner) if isinstance(each, type) and issubclass(each, BaseModel)]
        if listed and listed[0] is not Plugin and info.default is None:  # a section that may be left out
            yield f"`{prefix}{name}`", "`section`", "`null`"
            yield from _rows(listed[0], f"{prefix}{name}.")
            continue
        if listed and listed[0] is not Plugin:
            yield from _rows(listed[0], f"{prefix}{name}[].")
            continue
        shown = "needed" if info.default is PydanticUndefined and info.default_factory is None else f"`{_value(info)}`"
        free = " *free*" if info.json_schema_extra == {"free": True} else ""
        yield f"`{prefix}{name}`{free}", f"`{_type(inner)}`".replace("|", "\\|"), shown


def _value(info: Any) -> str:
    value = info.default_factory() if info.default_factory is not None else info.default
    named = getattr(value, "name", None)
    plain = {None: "null", True: "true", False: "false"}
    return str(named if named is not None else plain.get(value, value) if isinstance(value, bool | None) else value)


def _type(hint: Any) -> str:
    from upq.core.config import Plugin

    if get_origin(hint) is Literal:
        return " | ".join("null" if value is None else str(value) for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(_type(each) for each in get_args(hint))
    if get_args(hint):
        inner = ", ".join(_type(each) for each in get_args(hint) if each is not Ellipsis)
        return f"{_type(get_origin(hint))}[{inner}]"
    plain = {type(None): "null", tuple: "list", Plugin: "name, or name with options"}
    return plain.get(hint, getattr(hint, "__name__", str(hint)))


def interface() -> str:
    """What `import upq` shows, and the error that all of it raises."""
    import upq
    from upq.core.errors import UPQError

    parts = ["# Python interface", "Made from signatures and docstrings. [UPQ in Python](../python.md) has examples."]
    for name in sorted(set(upq.__all__) - {"__version__"}):
        parts += [f"## upq.{name}", f"```python\n{name}{_signature(getattr(upq, name))}\n```", _doc(getattr(upq, name))]
    parts += ["## upq.core.errors.UPQError", _doc(UPQError)]
    return "\n\n".join(parts) + "\n"


def _signature(function: Callable[..., Any]) -> str:
    found = inspect.signature(function)
    lines, star = [], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            lines, star = [*lines, "    *,"], True
        name = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "") + parameter.name
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}".replace("'", '"')
        lines.append(f"    {name}: {parameter.annotation}{default},")
    returned = found.return_annotation
    return "\n".join(["(", *lines, f") -> {returned if isinstance(returned, str) else returned.__name__}"])


def _doc(thing: Any) -> str:
    """Paragraphs as they are; `name: meaning` becomes an item of a list, and an example a block of code."""
    parts = []
    for paragraph in inspect.cleandoc(thing.__doc__ or "").split("\n\n"):
        if paragraph.startswith(">>>"):
            parts.append(f"```python\n{re.sub(r'^(>>>|[.]{3}) ', '', paragraph, flags=re.MULTILINE)}\n```")
            continue
        parts.append(re.sub(r"^(\w+(?:, \w+)*): ", r"- `\1`: ", paragraph, flags=re.MULTILINE))
    return "\n\n".join(parts)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, tuple("---" for _ in head), *(tuple(" ".join(cell.split()) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


if __name__ == "__main__":
    print(commands(), recipe_keys(), interface(), sep="\n\n")

"""Imports point down: a room imports rooms of lower floors only. This table is the architecture."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import upq

SRC = Path(upq.__file__).parent
FLOORS = (
    ("core",),
    ("files", "kernels"),
    ("grids", "losses"),
    ("text",),
    ("model", "data", "world"),
    ("nn",),
    ("blockwise", "distill", "decoding", "transforms"),
    ("artifact",),
    ("exports",),
    ("evals",),
    ("stages",),
    ("run",),
    ("reports",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(SRC.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, wherever in the file it stands: in functions and for type checkers too."""
    package = ["upq", *path.relative_to(SRC).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else []
            module = ".".join(base) or node.module
            # `from upq import kernels` names the room only in what it imports.
            yield from ((node.lineno, f"upq.{a.name}" if module == "upq" else module) for a in node.names)


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    for line, module in imports(path):
        first, *rest = module.split(".")
        if first == "upq" and rest and rest[0] in FLOOR:
            yield line, rest[0]


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in MODULES} - {"__init__"} == FLOOR.keys()


def test_imports_point_down() -> None:
    bad = []
    for path in MODULES:
        here = room(path)
        if here == "__init__":  # the package's own door opens on every layer
            continue
        for line, there in rooms_imported(path):
            if there != here and FLOOR[there] >= FLOOR[here]:
                bad.append(f"{path.relative_to(SRC)}:{line} {here} -> {there}")
    assert not bad, bad


def test_rooms_form_no_circle() -> None:
    graph = {name: set[str]() for name in FLOOR}
    for path in MODULES:
        if room(path) in graph:
            graph[room(path)] |= {there for _, there in rooms_imported(path)} - {room(path)}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", [p for p in MODULES if FLOOR.get(room(p), 9) <= 1], ids=lambda p: p.stem)
def test_values_and_arithmetic_know_no_model_library(path: Path) -> None:
    libraries = {module.split(".")[0] for _, module in imports(path)}
    assert not libraries & {"transformers", "accelerate", "datasets", "typer", "rich"}

"""JSON and YAML that a stranger may have written, with bounds on size, number of values and depth.

Text is measured before it is parsed. A value costs up to 64 bytes in Python and as little as 3 in JSON (`[],`), so a
bound on bytes alone would leave twenty times as much memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from upq.core.errors import UPQError

FILE_BYTES = 32 << 20  # the index of a model with 91,000 tensors has 9 MB
FILE_VALUES = 1 << 20
FILE_DEPTH = 64
YAML_BYTES = 1 << 18  # of which PyYAML reads 200 KB a second
YAML_VALUES = 10_000


def read_bytes(path: Path, limit: int = FILE_BYTES, *, remedy: str) -> bytes:
    """A whole file of at most `limit` bytes."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise UPQError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
    if len(raw) > limit:
        raise UPQError(f"{path}: larger than {limit:,} bytes, more than such a file can hold; {remedy}")
    return raw


def read_json(
    path: Path, *, remedy: str, limit: int = FILE_BYTES, values: int = FILE_VALUES, depth: int = FILE_DEPTH
) -> Any:
    """The value of a JSON file; errors name the file and `remedy`."""
    return parse_json(read_bytes(path, limit, remedy=remedy), str(path), remedy=remedy, values=values, depth=depth)


def parse_json(raw: bytes, where: str, *, remedy: str, values: int = FILE_VALUES, depth: int = FILE_DEPTH) -> Any:
    """The value of a JSON text; errors start with `where`."""
    # Each value but the first stands behind one of these; in strings they are counted too, which errs on the safe side.
    if sum(map(raw.count, (b",", b"[", b"{"))) > values:
        raise UPQError(f"{where}: more than {values:,} values, more than such a file can hold; {remedy}")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UPQError(f"{where}: cannot be read ({error}); {remedy}") from error
    if _depth(value) > depth:
        raise UPQError(f"{where}: nested more than {depth} deep; {remedy}")
    return value


def parse_yaml(text: str, loader: type[yaml.SafeLoader], where: str, *, remedy: str) -> Any:
    """The value of a YAML text. An alias counts as all that it stands for, so nothing expands behind the bounds."""
    if len(text) > YAML_BYTES:
        raise UPQError(f"{where}: longer than {YAML_BYTES:,} characters; {remedy}")
    try:
        _measure(text, loader, where, remedy)
        value = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML passes on Python's ValueError for an impossible number or date: 2001-99-99.
        raise UPQError(f"{where} is not valid YAML: {' '.join(str(error).split())}; {remedy}") from None
    _check_integers(value, where, remedy)
    return value


def _measure(text: str, loader: type[yaml.SafeLoader], where: str, remedy: str) -> None:
    """Go through the events, which PyYAML gives one by one and without recursion."""
    sizes: dict[str, int] = {}  # by anchor: values below it, itself included
    open_: list[tuple[str | None, int]] = []  # anchor of each open collection, and the count where it began
    count = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            # One that is open, or unknown, has no size yet.
            if event.anchor not in sizes:
                raise UPQError(f"{where}: alias *{event.anchor} stands within its own value or for none; {remedy}")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, began = open_.pop()
            if anchor:
                sizes[anchor] = count - began
        if count > YAML_VALUES or len(open_) > FILE_DEPTH:
            what = f"more than {YAML_VALUES:,} values" if count > YAML_VALUES else f"nested more than {FILE_DEPTH} deep"
            raise UPQError(f"{where}: {what}; {remedy}")


def _check_integers(value: Any, where: str, remedy: str) -> None:
    # Hexadecimal digits make an integer that Python refuses to write in decimal ones again.
    for inner in _values(value):
        if isinstance(inner, int) and inner.bit_length() > 64:
            raise UPQError(f"{where}: a number of {inner.bit_length():,} bits; {remedy}")


def _values(value: Any) -> Iterator[Any]:
    """Every value and key, without recursion."""
    rest = [value]
    while rest:
        inner = rest.pop()
        yield inner
        if isinstance(inner, dict):
            rest += inner.keys()
            rest += inner.values()
        elif isinstance(inner, list | tuple | set):
            rest += inner


def _depth(value: Any) -> int:
    """Collections within one another, level by level: without recursion."""
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth

"""JSON and YAML that a stranger may have written, with bounds on size, number of values and depth.

JSON is measured before it is parsed, YAML while it is. A value costs up to 64 bytes in Python and as little as 3 in
JSON (`[],`), so a bound on bytes alone would leave twenty times as much memory.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from upq.core.errors import UPQError
from upq.core.pointers import check_pointer

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
    check_pointer(path)
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


def parse_yaml(text: str, where: str, *, remedy: str) -> Any:
    """The value of a YAML text without aliases and without a key that stands twice; errors start with `where`."""
    if len(text) > YAML_BYTES:
        raise UPQError(f"{where}: longer than {YAML_BYTES:,} characters; {remedy}")
    try:
        return yaml.load(text, Loader=_Loader)
    except _Refused as error:
        raise UPQError(f"{where}: {error}; {remedy}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML passes on Python's ValueError for an impossible number or date: 2001-99-99.
        raise UPQError(f"{where} is not valid YAML: {' '.join(str(error).split())}; {remedy}") from None


class _Refused(yaml.YAMLError):
    """Valid YAML that no file of ours needs."""

    def __init__(self, what: str, mark: yaml.Mark) -> None:
        super().__init__(f"{what} (line {mark.line + 1})")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text, for want of a dot; here it is a number, as in YAML 1.2."""

    _count = _open = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if event.anchor is not None:
            raise _Refused(f"{event.anchor!r} is an anchor or an alias; write its value out", event.start_mark)
        self._count, self._open = self._count + 1, self._open + 1
        if self._count > YAML_VALUES:
            raise _Refused(f"more than {YAML_VALUES:,} values", event.start_mark)
        if self._open > FILE_DEPTH:
            raise _Refused(f"nested more than {FILE_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._open -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _Refused(f"key {_shown(key.value)} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        value = int(super().construct_yaml_int(node))
        if value.bit_length() > 64:  # of hexadecimal digits: Python refuses to write it in decimal ones
            raise _Refused(f"a number of {value.bit_length():,} bits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _shown(key: str) -> str:
    return repr(key if len(key) <= 80 else f"{key[:80]}…")


def _depth(value: Any) -> int:
    """Collections within one another, level by level: without recursion."""
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth

"""The house rule of CONTRIBUTING.md, as far as a list of words can hold it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Words that stand for one of the field, or that let a thing speak: told → gets, imagined → fake, alike → equal.
BANNED = ("told", "heeds", "heeded", "imagined", "whoever", "whatsoever", "thereof", "alike", "beforehand", "hitherto")
# People of the generated world do tell one another facts, and its sentences are data.
DATA = [ROOT / path for path in ("src/upq/world", "tests/test_world.py")]
KINDS = (".py", ".pyi", ".cpp", ".hpp", ".yaml", ".md")
PLACES = ("src", "tests", "benchmarks", "tools", "docs", "README.md", "CONTRIBUTING.md", "LOG.md")
FILES = sorted(
    path
    for place in PLACES
    for path in ((ROOT / place).rglob("*") if (ROOT / place).is_dir() else [ROOT / place])
    if path.suffix in KINDS and path != Path(__file__) and not any(path.is_relative_to(data) for data in DATA)
)


def test_no_banned_word() -> None:
    word = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)
    lines = ((path, number, line) for path in FILES for number, line in enumerate(path.read_text().splitlines(), 1))
    found = [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for path, number, line in lines if word.search(line)]
    assert not found, "\n".join(found)

"""The terminal. Text is printed as it stands: rich's markup and emoji codes are off, for paths hold brackets, colons.

What has a style is a `Text` made of parts, never a string with tags.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """The one place that makes a Console."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def styled(*parts: str | tuple[str, str]) -> Text:
    """One text of plain parts and parts with a style."""
    return Text.assemble(*((plain(part), "") if isinstance(part, str) else (plain(part[0]), part[1]) for part in parts))


def plain(text: str) -> str:
    """Without control sequences and halves of characters, which names from files may hold."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)

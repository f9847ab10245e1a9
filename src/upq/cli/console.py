"""Figures and tables for a person at the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from upq.core.sizes import size as size


def table(title: str, columns: list[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    """A table whose first column is text and whose others are figures."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, column in enumerate(columns):
        # Where the terminal is narrow, the words of a heading stand below one another before a cell is cut.
        widest = max((cell_len(str(row[i])) for row in rows), default=0)
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=False, min_width=widest)
    for row in rows:
        made.add_row(*row)
    return made

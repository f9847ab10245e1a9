"""What the benchmarks print and write: tables for a terminal and for Markdown, and figures beside their targets."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box, table
from rich.console import Console


@dataclass(frozen=True, slots=True)
class Table:
    """The first column is text, all others are numbers with their units."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [f"| {' | '.join(line)} |" for line in (self.head, *self.rows)]
        lines.insert(1, "|---|" + "---:|" * (len(self.head) - 1))
        return "\n".join(lines) + "\n"

    def show(self, console: Console) -> None:
        shown = table.Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, head in enumerate(self.head):
            shown.add_column(head, justify="right" if number else "left")
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number and what it was meant to be."""

    name: str
    value: float
    unit: str
    target: str
    ok: bool


def make_console() -> Console:
    """The terminal's width, or in a pipe enough for the widest table."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def show_figures(figures: Sequence[Figure], console: Console) -> None:
    for figure in figures:
        mark = "[green]met[/green]" if figure.ok else "[red]missed[/red]"
        console.print(f"{mark}  {figure.name}: {figure.value:.3f} {figure.unit} (target {figure.target})")


def write_figures(figures: Sequence[Figure], path: Path) -> None:
    plain: list[dict[str, Any]] = [
        {"name": f.name, "value": f.value, "unit": f.unit, "target": f.target, "ok": f.ok} for f in figures
    ]
    path.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def spread(values: Sequence[float], style: str) -> str:
    """Mean ± standard deviation, or the one value."""
    mean = f"{statistics.mean(values):{style}}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):{style}}"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a row; the columns are the keys of all rows, in the order they come up. Absent keys are empty cells."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_plain(row.get(name)) for name in names] for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)

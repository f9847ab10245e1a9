"""Finished rows as a table on the terminal, in Markdown and in CSV, and the figures with their targets."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from run import Row

TASKS = ("mini_mmlu", "mini_ifeval")
FURTHER = ("ppl_wikitext2", "kld_wikitext2")  # of subjects with a second held-out text
HEADS = [
    "row",
    "layers at 2 bits",
    "bits a weight",
    "perplexity",
    "KL",
    *FURTHER,
    *TASKS,
    "minutes",
    "CPU minutes",
    "peak memory",
    "error",
]
Finished = list[tuple["Row", dict[str, Any]]]


def report(finished: Finished, subject: str, folder: Path, console: Console, json_file: Path | None) -> None:
    cells = [cells_of(row, found) for row, found in finished]
    columns = [i for i, head in enumerate(HEADS) if head not in FURTHER or any(line[i] != "–" for line in cells)]
    heads, cells = [HEADS[i] for i in columns], [[line[i] for i in columns] for line in cells]
    table = Table(title=f"{subject}, held-out text", title_justify="left")
    for i, head in enumerate(heads[:-1]):
        table.add_column(head, justify="right" if i else "left", no_wrap=i == 0)
    for line in cells:
        table.add_row(*line[:-1])
    console.print(table)
    for line in cells:
        if line[-1]:  # too long for a column
            console.print(f"{line[0]}: {line[-1]}", highlight=False, markup=False)
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 2) + "---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    write_csv(finished, folder / "table.csv")
    figures = targets(finished, subject)
    for figure in figures:
        mark = "[green]met[/green]" if figure["ok"] else "[red]missed[/red]"
        console.print(f"{mark}  {figure['name']}: {figure['value']:.3f} {figure['unit']} (target {figure['target']})")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def cells_of(row: Row, found: dict[str, Any]) -> list[str]:
    """Cells as text; a dash where there is nothing to show."""
    tasks, others = found.get("tasks", {}), found.get("others", {})
    return [
        row.name,
        shown(found.get("quantised"), lambda paths: f"{len(paths)} of {found['linears']}"),
        shown(found.get("bits_per_weight"), "{:.2f}".format),
        shown(found.get("ppl"), "{:.2f}".format),
        shown(found.get("kld"), "{:.4f}".format),
        *(shown(others.get(key), "{:.4g}".format) for key in FURTHER),
        *(shown(tasks.get(task), "{:.1%}".format) for task in TASKS),
        shown(found.get("seconds"), lambda s: f"{s / 60:.1f}"),
        shown(found.get("cpu_seconds"), lambda s: f"{s / 60:.1f}"),
        shown(found.get("peak_memory_bytes"), lambda b: f"{b / 1e6:.0f} MB"),
        found.get("error") or "",
    ]


def shown(value: Any, style: Any) -> str:
    return "–" if value is None else style(value)


def write_csv(finished: Finished, file: Path) -> None:
    """The same rows unrounded, with the peer's version and its settings in words."""
    keys = ["bits_per_weight", "ppl", "kld", "top1", "seconds", "cpu_seconds", "peak_memory_bytes"]
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["row", "version", "settings", "linears", "quantised", "kept", *keys, *FURTHER, *TASKS, "error"]
        )
        for row, found in finished:
            paths = [found.get(key) for key in ("quantised", "kept")]
            counts = [found.get("linears"), *(None if p is None else len(p) for p in paths)]
            tasks = [found.get("others", {}).get(key) for key in FURTHER]
            tasks += [found.get("tasks", {}).get(task) for task in TASKS]
            figures = [found.get(key) for key in keys]
            head = [row.name, found["version"], found.get("settings")]
            writer.writerow([*head, *counts, *figures, *tasks, found.get("error")])


def targets(finished: Finished, subject: str) -> list[dict[str, Any]]:
    """UPQ with one scale a row against the best peer at each group size, among peers that quantised every linear."""
    ours = next(
        (f["kld"] for row, f in finished if row.peer == "upq" and row.variant == "default" and "kld" in f), None
    )
    figures = []
    for size in sorted({row.group_size for row, _ in finished}):
        complete = {
            row.name: found["kld"]
            for row, found in finished
            if row.peer != "upq" and row.group_size == size and "kld" in found
            if len(found["quantised"]) == found["linears"]
        }
        if ours is None or not complete:
            continue
        best = min(complete, key=complete.__getitem__)
        ratio = ours / complete[best]
        name = f"{subject}: KL of UPQ `default`, one scale a row, over that of {best}"
        figures.append({"name": name, "value": ratio, "unit": "ratio", "target": "< 1", "ok": ratio < 1})
    return figures

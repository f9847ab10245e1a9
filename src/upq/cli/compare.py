"""`upq compare`: two or more models on the same items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upq.files.target import Target

if TYPE_CHECKING:
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text


def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="A B …", help="Directories or hub ids: artefacts or originals; two or more.")
    ],
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas: mmlu,ifeval,arc_easy.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Text, compared row by row; repeatable.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="ORIGINAL", help="Compare the KL to this model too, on --text.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local files of tasks (docs/tasks.md), not the hub's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task (of each subject for mmlu).")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Programs written for each problem of humaneval or code.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Of these programs; default 0 for one, 0.2 for several.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows or questions computed at a time.")] = 4,
    answers: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep answers here; the same command goes on where it stopped.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page (HTML) as well.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")] = None,
) -> None:
    """Compare models item by item: paired differences with 95 % intervals, which answers changed, loops and cuts."""
    target, page = Target.of(json_file), Target.of(out, "--out")

    from upq.cli.console import table
    from upq.reports.api import compare
    from upq.reports.page import check_packages, comparison
    from upq.run.console import console, styled

    if page.path is not None:
        check_packages()
    found = compare(
        *models,
        tasks=tasks or (),
        text=text or (),
        against=against,
        data_dir=data_dir,
        limit=limit,
        samples=samples,
        temperature=temperature,
        batch_size=batch_size,
        answers=answers,
        device=device,
    )  # without the page: where it cannot be written, the tables are shown all the same
    shown = console()
    shown.print(table("scores", found["scores"]["columns"], found["scores"]["rows"]))
    shown.print(_differences(found["differences"], shown.width))
    if found["asked_tasks"]:
        shown.print(f"{found['changed_all']} answers changed between right and wrong")
    if page.path is not None:
        page.write_text(comparison(dict(found)))
        shown.print(styled((str(page.path), "bold"), " is ready"), soft_wrap=True)
    target.write(found)


_WORDS = ("models", "measure", "verdict")
_NONE = "–"
_NARROW = 20  # characters that words need, or a table is hard to read


def _differences(found: dict[str, Any], width: int) -> Table | Group:
    """A table without the columns that no row has a figure for; where that is too wide, a measure and then its figures.

    Words wrap in a table, numbers do not.
    """
    from rich.cells import cell_len
    from rich.table import Table

    title = "differences, the later model minus the earlier"
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    used = [i for i in range(len(found["columns"])) if any(row[i] != _NONE for row in found["rows"])]
    needed = 1
    for i in used:
        name, words = found["columns"][i], found["columns"][i] in _WORDS
        widest = max(cell_len(cell) for cell in (name, *(row[i] for row in found["rows"])))
        least = min(widest, _NARROW) if words else widest
        made.add_column(name, justify="left" if words else "right", no_wrap=not words, min_width=least)
        needed += least + 3
    for row in found["rows"]:
        made.add_row(*(row[i] for i in used))
    return made if needed <= width else _lines(title, found)


def _lines(title: str, found: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.padding import Padding

    from upq.run.console import styled

    lines: list[Text | Padding] = [styled((title, "bold"))]
    for row in found["rows"]:
        cells = dict(zip(found["columns"], row, strict=True))
        about = ": ".join(cells[name] for name in _WORDS[:2] if name in cells)
        figures = [f"{name} {cell}" for name, cell in cells.items() if name not in _WORDS and cell != _NONE]
        lines += [styled(f"{about}: ", (cells["verdict"], "bold")), Padding(styled(", ".join(figures)), (0, 0, 0, 4))]
    return Group(*lines)

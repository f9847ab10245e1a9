"""`upq export`: an artefact as another engine's files, proven on that engine's reader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from upq.exports import Report


def export(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A finished artefact: the --out of upq quantize.")
    ],
    to: Annotated[str, typer.Option(help="Format: gguf, compressed-tensors, dense … (docs/engines.md).")],
    out: Annotated[Path, typer.Option(help="The file or directory to write; nothing there is overwritten.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the format; repeatable.")
    ] = None,
    allow_inexact: Annotated[bool, typer.Option(help="Write it even where weights have to be rounded.")] = False,
) -> None:
    """Write ARTIFACT for another engine, read it back as that engine does, and compare every weight."""
    from upq.run.api import export
    from upq.run.console import console, styled

    report = export(artifact, to, out, allow_inexact=allow_inexact, **_options(set_ or []))
    from upq.exports import report_path

    shown = console()
    shown.print(report_table(report))
    for note in report.notes:
        shown.print(styled(f"note: {note}"), soft_wrap=True)
    verdict = ("exact", "green") if report.exact else ("not exact", "yellow")
    shown.print(styled((str(out), "bold"), " is ready, ", verdict, f"; report: {report_path(out)}"), soft_wrap=True)


def _options(items: list[str]) -> dict[str, Any]:
    from upq.core.config import override

    options: dict[str, Any] = {}
    for item in items:
        override(options, item)
    return options


def report_table(report: Report) -> Table:
    """The engine's types, what each carries, and the largest error of what was read back."""
    from upq.cli.console import size, table
    from upq.run.reporter import duration

    rows = [
        [
            carried.carrier,
            str(carried.weights),
            size(carried.bytes),
            f"{8 * carried.bytes / carried.numbers:.3f}",
            "0" if carried.max_error == 0 else f"{carried.max_error:.3g}",
            "0" if carried.relative_error == 0 else f"{carried.relative_error:.2%}",
        ]
        for carried in report.carriers
    ]
    columns = ["type", "tensors", "size", "bits a weight", "largest error", "relative"]
    made = table("", columns, rows)
    engine = ", ".join(f"{package} {version}" for package, version in report.engine.items())
    times = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.seconds.items())
    made.caption = (
        f"{size(report.bytes)} in all, {report.bits_per_weight:.3f} bits a weight in the blocks; "
        f"checked: {report.checked}, compared in {report.compared_in} ({engine}); {times}"
    )
    made.caption_justify = "left"
    return made

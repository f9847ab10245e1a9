"""`upq report`: one page about a run or an artefact."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from upq.files.target import Target


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The --out of upq quantize: finished, under way or interrupted.")
    ],
    against: Annotated[
        str | None, typer.Option(metavar="ORIGINAL", help="The model it was made from, for --prompts and --text.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt a line, or JSON lines; answered by both models.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Text to compare both models on, by file; repeatable.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page; default: DIR/report.html.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")] = None,
) -> None:
    """Write one HTML file about DIR: size, quality, errors of layers, training, where answers differ, how to use it."""
    target = Target.of(json_file)

    from upq.reports.api import report
    from upq.run.console import console, styled

    page = report(directory, against=against, prompts=prompts, text=text or (), out=out)
    target.write(page.figures)
    console().print(styled((str(page.path), "bold"), f" is ready ({page.bytes / 1e6:.1f} MB)"), soft_wrap=True)
    if open_:
        webbrowser.open(page.path.resolve().as_uri())

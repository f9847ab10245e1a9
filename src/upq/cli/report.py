"""`upq report`: one page about a run or an artefact."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from upq.cli.json_file import Target
from upq.core.errors import UPQError
from upq.core.paths import local, local_or_hub


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
    folder = local(directory)
    if not folder.is_dir():
        raise UPQError(f"{directory}: no such directory; name the --out of upq quantize")
    page = Target.of(out or folder / "report.html", "--out")

    from upq.run.console import console, styled
    from upq.run.reporter import loading, reporter

    with loading():
        from upq.report.make import make
        from upq.run.quiet import quiet_libraries

    quiet_libraries()
    with reporter(console(stderr=True)) as progress:
        facts, html = make(
            folder,
            against=None if against is None else local_or_hub(against),
            prompts=None if prompts is None else local(prompts),
            texts=[local(each) for each in text or ()],
            progress=progress,
        )
    page.write_text(html)
    target.write(facts)
    assert page.path is not None
    console().print(styled((str(page.path), "bold"), f" is ready ({len(html.encode()) / 1e6:.1f} MB)"), soft_wrap=True)
    if open_:
        webbrowser.open(page.path.resolve().as_uri())

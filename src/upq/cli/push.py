"""`upq push`: an artefact to the Hugging Face hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from upq.core.errors import UPQError
from upq.core.paths import local


def push(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A finished artefact: the --out of upq quantize.")
    ],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; it is created if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it; without, it is private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded, and stop.")] = False,
    licence: Annotated[
        str | None, typer.Option(help="The base model's licence, by the hub's name; default: what its card says.")
    ] = None,
) -> None:
    """Upload ARTIFACT with its card and, if it is there, its report, in one commit. What goes up is listed first."""
    from upq.cli.console import size, table
    from upq.run.console import console, styled
    from upq.run.reporter import loading

    with loading():
        from upq.artifact.hub import prepare, publish_on_hub

    shown = console()
    upload = prepare(local(artifact), repo, licence=licence)
    sizes = upload.sizes()
    rows = [[name, size(count)] for name, count in sizes.items()]
    shown.print(table("", [f"{len(rows)} files, {size(sum(sizes.values()))}", ""], rows))
    shown.print(styled(("licence ", "bold"), f"{upload.licence.allows} ({upload.licence.where})"), soft_wrap=True)
    shown.print(styled(("base model ", "bold"), upload.base or "not on the hub; the card names none"), soft_wrap=True)
    seen = ("public", "bold yellow") if public else ("private", "bold")
    shown.print(styled(("to ", "bold"), repo, ", ", seen), soft_wrap=True)
    if dry_run:
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UPQError("push: nobody to ask here; --yes agrees to what is listed")
        if not typer.confirm("Upload this?"):
            raise typer.Exit(1)
    where = publish_on_hub(upload, public=public)
    shown.print(styled((where, "bold"), " is ready"), soft_wrap=True)

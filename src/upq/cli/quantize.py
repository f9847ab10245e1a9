"""`upq quantize`: the whole way from a model to its 2-bit artefact."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upq.core.signals import Stop

if TYPE_CHECKING:
    from rich.table import Table

    from upq.artifact.manifest import Manifest


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face causal LM: directory or hub id.")],
    out: Annotated[Path, typer.Option(help="Directory of the artefact; the same command again resumes.")],
    recipe: Annotated[str, typer.Option(help="Recipe of the package (default, paper) or a YAML file.")] = "default",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text, JSON lines, parquet, a directory or a hub data set; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    keep_work: Annotated[bool, typer.Option(help="Keep solved blocks and checkpoints after the end.")] = False,
    redo: Annotated[bool, typer.Option("--redo", help="Agree to do stages anew whose settings differ now.")] = False,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep stages in DIR, where other runs of this model find them.")
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Agree that under 90 % of the decoder's weights become codes.")
    ] = False,
) -> None:
    """Quantise MODEL: block by block, then by distillation from the original, packed into --out."""
    from upq.run.api import quantize
    from upq.run.console import console, styled
    from upq.run.reporter import loading

    with loading():
        from upq.run.recipe import Recipe

    chosen = Recipe.load(recipe, set_ or [])
    with Stop().listening() as stop:
        manifest = quantize(
            model,
            out,
            chosen,
            data=data,
            device=device,
            keep_work=keep_work,
            redo=redo,
            work=work,
            allow_partial=allow_partial,
            stop=stop,
        )
    shown = console()
    shown.print(result_table(manifest))
    shown.print(styled(manifest.coverage))
    for line in bad_rows(manifest):
        shown.print(styled(line), soft_wrap=True)
    shown.print(styled((str(out), "bold"), f" is ready: upq chat {shlex.quote(str(out))}"), soft_wrap=True)


def bad_rows(manifest: Manifest) -> Iterator[str]:
    """A line for each source with rows that could not be used."""
    for source in manifest.data:
        if source.get("bad_rows"):
            yield f"{source['path']}: {source['bad_rows']:,} of {source['rows']:,} rows could not be used, left out"


def result_table(manifest: Manifest) -> Table:
    """Before and after: size, perplexity and distance on the held-out rows; then time and memory."""
    from upq.cli.console import size, table
    from upq.run.reporter import duration

    names = {"source": "original", "artifact": "artefact"}
    rows = []
    for key, figures in manifest.metrics.items():
        kld, top1 = figures.get("kld"), figures.get("top1")
        rows.append(
            [
                names.get(key, f"after {key}"),
                size(figures["bytes"]) if "bytes" in figures else "–",
                f"{figures['bits_per_weight']:.2f}",
                f"{figures['ppl']:.3f}",
                "–" if kld is None else f"{kld:.4f}",
                "–" if top1 is None else f"{top1:.1%}",
            ]
        )
    made = table("", ["model", "size", "bits a weight", "perplexity", "KL to original", "same top-1"], rows)
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in manifest.seconds.items())
    total = duration(sum(manifest.seconds.values()))
    memory = size(manifest.peak_memory_bytes or 0)
    made.caption = f"time {total} ({stages}); peak memory {memory}"
    made.caption_justify = "left"
    return made

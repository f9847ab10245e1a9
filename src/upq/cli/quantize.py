"""`upq quantize`: the whole way from a model to its 2-bit artefact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upq.core.errors import UPQError

if TYPE_CHECKING:
    from rich.table import Table

    from upq.artifact.manifest import Manifest
    from upq.run.recipe import Recipe


def quantize(
    model: Annotated[str, typer.Argument(help="Hugging Face causal LM: directory or hub id.")],
    out: Annotated[Path, typer.Option(help="Directory of the artefact; the same command again resumes.")],
    recipe: Annotated[str, typer.Option(help="Recipe of the package (default, paper) or a YAML file.")] = "default",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, JSON lines, parquet, a directory or a hub data set; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    keep_work: Annotated[bool, typer.Option(help="Keep solved blocks and checkpoints after the end.")] = False,
) -> None:
    """Quantise MODEL: block by block, then by distillation from the original, packed into --out."""
    chosen = load_recipe(recipe, set_ or [], data or [])

    from rich.console import Console

    from upq.cli.console import reporter
    from upq.cli.quiet import quiet_libraries
    from upq.core.signals import Stop
    from upq.run import run as pipeline

    quiet_libraries()
    console = Console()
    with Stop().listening() as stop, reporter(console) as progress:
        manifest = pipeline.quantize(
            model, chosen, out, device=device, keep_work=keep_work, progress=progress, stop=stop
        )
    console.print(result_table(manifest))
    console.print(f"[bold]{out}[/bold] is ready: upq chat {out}", highlight=False, soft_wrap=True)


def load_recipe(name: str, overrides: list[str], data: list[str]) -> Recipe:
    """The recipe with its overrides; `data` replaces its sources."""
    from upq.data.config import Source
    from upq.run.recipe import Recipe

    recipe = Recipe.load(name, overrides)
    if data:
        sources = tuple(Source(path=path) for path in data)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": sources})})
    for source in recipe.data.sources:
        if source.path.startswith((".", "/", "~")) and not Path(source.path).exists():
            raise UPQError(f"--data {source.path}: no such file or directory")
    return recipe


def result_table(manifest: Manifest) -> Table:
    """Before and after: size, perplexity and distance on the held-out rows; then time and memory."""
    from upq.cli.console import duration, size, table

    names = {"source": "original", "int4": "after INT4", "artifact": "artefact"}
    rows = []
    for key, figures in manifest.metrics.items():
        kld, top1 = figures.get("kld"), figures.get("top1")
        rows.append(
            [
                names.get(key, key),
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

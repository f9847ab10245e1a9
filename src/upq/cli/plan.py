"""`upq plan`: what a run will need, before it starts."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upq.files.target import Target

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from upq.run.plan import Plan


def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hugging Face causal LM: directory or hub id. No weights are read."),
    ],
    recipe: Annotated[str, typer.Option(help="Recipe of the package (default, paper) or a YAML file.")] = "default",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
    ] = None,
    memory: Annotated[float | None, typer.Option(min=0.1, help="Of the machine, in GB; default: of this one.")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs to plan for; 0: the processor.")] = 0,
    gpu_memory: Annotated[float | None, typer.Option(min=0.1, help="Of one GPU, in GB.")] = None,
    gpu_tflops: Annotated[float | None, typer.Option(min=0.1, help="Of one GPU in bf16, for the time.")] = None,
    gpu_bandwidth: Annotated[float | None, typer.Option(min=0.1, help="Of one GPU in GB/s, for the time.")] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Agree that under 90 % of the decoder's weights become codes.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file as well.")] = None,
) -> None:
    """Show what each stage needs, and the settings that make it fit. Exit code 1 where nothing makes it fit."""
    target = Target.of(json_file)

    from upq.run.api import plan
    from upq.run.console import console
    from upq.run.reporter import loading

    with loading():
        from upq.run.recipe import Recipe

    made = plan(
        model,
        Recipe.load(recipe, set_ or []),
        memory=memory,
        gpus=gpus,
        gpu_memory=gpu_memory,
        gpu_tflops=gpu_tflops,
        gpu_bandwidth=gpu_bandwidth,
        allow_partial=allow_partial,
    )
    shown = console()
    shown.print(table_of(made))
    for line in notes(made, model, recipe, set_ or []):
        shown.print(line, soft_wrap=line.plain.startswith(" "))  # of a command no line may be broken
    target.write(dataclasses.asdict(made))
    raise typer.Exit(not made.fits)


def table_of(made: Plan) -> Table:
    """A line a stage; what does not fit is red."""
    from upq.cli.console import size, table
    from upq.run.console import styled
    from upq.run.reporter import duration

    where = "memory of a GPU" if made.machine.gpus else "memory"
    rows: list[list[str | Text]] = []
    for stage in made.stages:
        fits = stage.memory <= made.machine.memory
        memory = styled((size(stage.memory), "" if fits else "red"))
        took = duration(stage.seconds) if stage.seconds else "–"
        rows.append([stage.name, f"{stage.tokens:,}", memory, size(stage.disk), took])
    disk, seconds = sum(stage.disk for stage in made.stages), [stage.seconds for stage in made.stages]
    total = "–" if None in seconds else duration(sum(each or 0 for each in seconds))
    rows.append(["all", "", size(max(stage.memory for stage in made.stages)), size(disk), total])
    found = table("", ["stage", "tokens", where, "disk", "time, about"], rows)
    found.rows[-2].end_section = True
    return found


def notes(made: Plan, model: str, recipe: str, overrides: list[str]) -> Iterator[Text]:
    """What the figures come to, and the command to paste."""
    from upq.cli.console import size
    from upq.run.console import styled
    from upq.run.plan import SCALES_ALONE

    gpus = made.machine.gpus
    limit = size(made.machine.memory) + (" of a GPU" if gpus else "")
    yield styled(f"{made.weights / 1e9:.3g} billion weights: {made.coverage}")
    if gpus and made.machine.speed is None:
        yield styled("for the time of GPUs give --gpu-tflops and --gpu-bandwidth, as they are reached")
    settings = " ".join(f"--set {setting}" for setting in made.settings)
    if not made.fits:
        peak = max(made.stages, key=lambda stage: stage.memory)
        tried = f" even with {settings}" if settings else ""
        needs = f" in {limit}{tried}: {peak.name} needs {size(peak.memory)}"
        yield styled(("does not fit", "bold red"), needs)
        return
    yield styled(("fits", "bold green"), f" in {limit}{' with these settings' * bool(settings)}")
    if SCALES_ALONE in made.settings:
        yield styled(f"{SCALES_ALONE} is another training: scales alone learn (docs/scale.md)")
    start = f"torchrun --nproc-per-node {gpus} -m upq" if gpus > 1 else "upq"
    given = "".join(f" --set {shlex.quote(override)}" for override in overrides)
    chosen = "" if recipe == "default" else f" --recipe {shlex.quote(recipe)}"
    yield styled(f"  {start} quantize {shlex.quote(model)} --out DIR{chosen}{given}{' ' * bool(settings)}{settings}")

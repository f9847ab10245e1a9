"""Does a rotation before two bits help, with and without training? `python benchmarks/rotations.py --subject reference`

`default` cut down, with `rotate` folded in before the blocks: KL to the original on held-out text with the blocks alone
and after a short training. A finished run is not repeated.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated

import typer

from _judge import judge
from _subjects import ROOT, prepared
from _table import Figure, Table, make_console, show_figures, write_figures

if TYPE_CHECKING:
    from upq.run.recipe import Recipe

VARIANTS = {
    "none": None,
    "value": "{name: rotate, sites: [value]}",
    "residual": "{name: rotate, sites: [residual], untie: true}",
    "both": "{name: rotate, untie: true}",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    subject: Annotated[str, typer.Option(help="reference, smollm2 or gemma3.")] = "reference",
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)}, by commas.")] = ",".join(VARIANTS),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows.")] = 32,
    iterations: Annotated[int, typer.Option(min=1, help="Of each block.")] = 50,
    tokens: Annotated[int, typer.Option(min=0, help="Of the training; 0: none.")] = 100_352,
    rows: Annotated[int, typer.Option(min=1, help="Held out, of each text.")] = 64,
    set_: Annotated[list[str], typer.Option("--set", help="Of the recipe; repeatable.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Artefacts, and the blocks that they share.")] = ROOT / "runs" / "rotations",
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    from upq.run.api import quantize
    from upq.run.recipe import Recipe

    folder = out / subject
    chosen, train, texts = prepared(subject, folder, tokens=max(tokens, 512 * samples), rows=rows)
    shared = [f"int2.samples={samples}", f"int2.method.iterations={iterations}", *set_]
    console, made, shown = make_console(), list[Figure](), list[tuple[str, ...]]()
    for variant in variants.split(","):
        for budget in sorted({0, tokens}):
            found = []
            for seed in range(seeds):
                settings = ["generate=null", *chosen.overrides, *shared, f"distill.tokens={budget}", f"seed={seed}"]
                recipe = turned(Recipe.load("default", settings), VARIANTS[variant])
                artefact = folder / f"{variant}-{budget}-{seed}"
                quantize(chosen.model, artefact, recipe, data=train, work=folder / "work")
                found.append(judge(artefact, chosen.model, texts, None, device="cpu")["kld"])
            shown.append((variant, f"{budget:,}", _spread(found)))
            made.append(Figure(f"KL, {variant}, {budget} tokens", mean(found), "nats", "none", True))
            Table(f"{subject}: KL to the original", ("rotated", "tokens", next(iter(texts))), tuple(shown)).show(
                console
            )
    Table(f"{subject}: KL to the original", ("rotated", "tokens", next(iter(texts))), tuple(shown)).show(console)
    show_figures(made, console)
    if json_file:
        write_figures(made, json_file)


def turned(recipe: Recipe, method: str | None) -> Recipe:
    """With the stage `turn` before all others."""
    import yaml

    from upq.run.recipe import Recipe

    if method is None:
        return recipe
    raw = recipe.model_dump(mode="json")
    stages = {name: stage.settings() for name, stage in recipe.stages.items()}
    turn = {"stage": "transform", "method": yaml.safe_load(method)}
    return Recipe.of({**raw, "stages": {"turn": turn, **stages}}, "rotations")


def _spread(found: list[float]) -> str:
    return f"{mean(found):.4f}" + (f" ± {stdev(found):.4f}" if len(found) > 1 else "")


if __name__ == "__main__":
    app()

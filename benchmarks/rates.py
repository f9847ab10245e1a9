"""Which learning rate suits a model: `python benchmarks/rates.py --subject smollm2`

`default` cut down: the blocks are solved once, then a short training at each rate, then KL on held-out text. Rate 0 is
no training, null the one that `default` chooses by the width. A finished run is not repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from _judge import judge
from _subjects import ROOT, prepared
from _table import Figure, Table, make_console, show_figures, write_figures

SLACK = 1.05  # of the best KL: as much as the rate by width may leave

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    subject: Annotated[str, typer.Option(help="reference, smollm2 or gemma3.")] = "smollm2",
    rates: Annotated[str, typer.Option(help="Of the weights, by commas.")] = "0,5e-5,2e-4,1e-3,null",
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows.")] = 32,
    iterations: Annotated[int, typer.Option(min=1, help="Of each block.")] = 50,
    tokens: Annotated[int, typer.Option(min=1, help="Of each training.")] = 20_480,
    rows: Annotated[int, typer.Option(min=1, help="Held out, of each text.")] = 64,
    set_: Annotated[list[str], typer.Option("--set", help="Of the recipe; repeatable.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Artefacts, and the blocks that they share.")] = ROOT / "runs" / "rates",
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    from upq.run.api import quantize
    from upq.run.recipe import Recipe

    folder = out / subject
    chosen, train, texts = prepared(subject, folder, tokens=tokens, rows=rows)
    shared = [f"int2.samples={samples}", f"int2.method.iterations={iterations}", *set_]
    found = {}
    for rate in rates.split(","):
        own = ["distill.tokens=0"] if rate == "0" else [f"distill.tokens={tokens}", f"distill.lr={rate}"]
        recipe = Recipe.load("default", ["generate=null", *chosen.overrides, *shared, *own])
        quantize(chosen.model, folder / rate, recipe, data=train, work=folder / "work")
        found[rate] = judge(folder / rate, chosen.model, texts, None, device="cpu")
    names = list(texts)
    keys = ["kld", *(f"kld_{name}" for name in names[1:])]
    console = make_console()
    shown = tuple((rate, *(f"{figures[key]:.3f}" for key in keys)) for rate, figures in found.items())
    Table(f"{subject}: KL by rate", ("rate", *names), shown).show(console)
    best = min(figures["kld"] for rate, figures in found.items() if rate not in ("0", "null"))
    made = [Figure(f"KL at rate {rate}", figures["kld"], "nats", "none", True) for rate, figures in found.items()]
    if "null" in found:
        kld, limit = found["null"]["kld"], SLACK * best
        made.append(Figure("KL at the width's rate over the best", kld / best, "", f"<= {SLACK}", kld <= limit))
    show_figures(made, console)
    if json_file:
        write_figures(made, json_file)


if __name__ == "__main__":
    app()

"""Whether an attention sink survives two bits: `python benchmarks/sinks.py`

`default` cut down on a real model: the error of each block's output after the block-wise stage, apart for tokens with
massive states and for all others, then KL on held-out text after the training. `--set` changes the recipe:
`--set int2.method.start=nearest --set int2.method.scale=mse` shows what was before. A finished run is not repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from _judge import judge
from _subjects import ROOT, prepared
from _table import Figure, Table, make_console, show_figures, write_figures

ERROR, KL = 0.5, 1.33  # at most; the KL is half of what was reached without regard to the sink

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    subject: Annotated[str, typer.Option(help="smollm2 or gemma3.")] = "smollm2",
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows.")] = 32,
    iterations: Annotated[int, typer.Option(min=1, help="Of each block.")] = 50,
    tokens: Annotated[int, typer.Option(min=0, help="Of the training.")] = 61_440,
    rows: Annotated[int, typer.Option(min=1, help="Held out, of each text.")] = 128,
    set_: Annotated[list[str], typer.Option("--set", help="Of the recipe; repeatable.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="The artefact and its work.")] = ROOT / "runs" / "sinks",
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    from upq.blockwise import BlockStore
    from upq.core.scheme import QuantScheme
    from upq.run.api import quantize
    from upq.run.recipe import Recipe

    chosen, train, texts = prepared(subject, out, tokens=tokens, rows=rows)
    settings = [f"int2.samples={samples}", f"int2.method.iterations={iterations}", f"distill.tokens={tokens}"]
    recipe = Recipe.load("default", ["generate=null", *chosen.overrides, *settings, *set_])
    quantize(chosen.model, out / "artefact", recipe, data=train, keep_work=True)
    (folder,) = {path.parent for path in (out / "artefact").rglob("int2*/block-0000.safetensors")}
    store = BlockStore(folder, QuantScheme(bits=2))
    blocks = len(list(folder.glob("block-*.safetensors")))
    others = [next(iter(store.report(i).values()))["block"] for i in range(blocks)]
    massive = [(store.massive(i) or {}).get("error") for i in range(blocks)]
    console = make_console()
    shown = (
        (str(i), "–" if m is None else f"{m:.3f}", f"{o:.3f}")
        for i, (m, o) in enumerate(zip(massive, others, strict=True))
    )
    Table(f"{subject}: error of the output", ("block", "massive states", "all others"), tuple(shown)).show(console)
    found = judge(out / "artefact", chosen.model, texts, None, device="cpu")
    largest = max((m for m in massive if m is not None), default=0.0)
    figures = [
        Figure("largest error of massive states", largest, "", f"<= {ERROR}", largest <= ERROR),
        Figure("largest error of all others", max(others), "", f"<= {ERROR}", max(others) <= ERROR),
        Figure(f"KL, {next(iter(texts))}", found["kld"], "nats", f"<= {KL}", found["kld"] <= KL),
    ]
    show_figures(figures, console)
    if json_file:
        write_figures(figures, json_file)


if __name__ == "__main__":
    app()

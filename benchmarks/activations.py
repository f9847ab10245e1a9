"""What do rounded activations cost beside four-bit weights, and what do transforms win back?

`python benchmarks/activations.py --subject reference`. GPTQ on `affine`, one scale a row, inputs with a zero point: KL
to the original on held-out text, after the blocks alone and after a training. A finished run is not repeated.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer

from _judge import judge
from _subjects import ROOT, prepared
from _table import Figure, Table, make_console, show_figures, write_figures

A8: dict[str, Any] = {"activations": {}}
A4: dict[str, Any] = {"activations": {"bits": 4, "symmetric": False}}
KV4: dict[str, Any] = {**A4, "kv": {"bits": 4, "symmetric": False}}
TURNS: dict[str, list[dict[str, Any]]] = {
    "": [],
    "smoothed": [{"name": "smooth"}],
    "value": [{"name": "rotate", "sites": ["value"]}],
    "down": [{"name": "rotate", "sites": ["down"]}],
    "turned": [{"name": "rotate", "sites": ["residual", "value", "down"], "untie": True}],
    "blocks": [{"name": "rotate", "sites": ["inputs"], "block": 128}],
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A16": ("", {}),
    "W4A8": ("", A8),
    "W4A4": ("", A4),
    **{f"W4A4 {turn}": (turn, A4) for turn in TURNS if turn},
    "W4A4KV4": ("", KV4),
    "W4A4KV4 turned": ("turned", KV4),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    subject: Annotated[str, typer.Option(help="reference, smollm2 or gemma3.")] = "reference",
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)}, by commas.")] = ",".join(VARIANTS),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows.")] = 32,
    tokens: Annotated[int, typer.Option(min=0, help="Of the training; 0: none.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Held out, of each text.")] = 64,
    out: Annotated[Path, typer.Option(help="Artefacts, and the blocks that they share.")] = ROOT / "runs/activations",
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    from upq.run.api import quantize
    from upq.run.recipe import Recipe

    folder = out / subject
    chosen, train, texts = prepared(subject, folder, tokens=max(tokens, 512 * samples), rows=rows)
    console, made, shown = make_console(), list[Figure](), list[tuple[str, ...]]()
    for variant in variants.split(","):
        turn, rounded = VARIANTS[variant]
        found = []
        for seed in range(seeds):
            settings = ["generate=null", *chosen.overrides, f"distill.tokens={tokens}", f"seed={seed}"]
            raw = Recipe.load("default", settings)
            blocks = {"stage": "blockwise", "bits": 4, "grid": "affine", "samples": samples, "method": "gptq"}
            before = {f"turn{i}": {"stage": "transform", "method": method} for i, method in enumerate(TURNS[turn])}
            stages = {**before, "blocks": {**blocks, **rounded}, "distill": raw.stages["distill"].settings()}
            recipe = Recipe.of({**raw.model_dump(mode="json"), "stages": stages}, "activations")
            artefact = folder / f"{variant.replace(' ', '-')}-{tokens}-{seed}"
            quantize(chosen.model, artefact, recipe, data=train, work=folder / "work")
            found.append(judge(artefact, chosen.model, texts, None, device="cpu")["kld"])
        spread = f" ± {stdev(found):.4f}" if len(found) > 1 else ""
        shown.append((variant, f"{tokens:,}", f"{mean(found):.4f}{spread}"))
        made.append(Figure(f"KL, {variant}, {tokens} tokens", mean(found), "nats", "none", True))
        Table(f"{subject}: KL to the original", ("scheme", "tokens", next(iter(texts))), tuple(shown)).show(console)
    show_figures(made, console)
    if json_file:
        write_figures(made, json_file)


if __name__ == "__main__":
    app()

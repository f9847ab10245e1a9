"""What each stage of `default` brings on a real model: `python benchmarks/stages.py --subject gemma3`

Nearest rounding, the blocks alone, and the blocks with each budget of training, cut down to what a processor does in an
evening; perplexity and KL to the original on held-out text. They learn from text, and with `--conversations` from as
many tokens of the subject's conversations. The blocks are solved once. A finished run is not repeated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from _judge import judge
from _subjects import ROOT, prepared
from _table import Figure, Table, make_console, show_figures, write_csv, write_figures

RUNS = ROOT / "runs" / "stages"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    subject: Annotated[str, typer.Option(help="reference, smollm2 or gemma3.")] = "gemma3",
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows.")] = 32,
    iterations: Annotated[int, typer.Option(min=1, help="Of each block.")] = 50,
    tokens: Annotated[str, typer.Option(help="Budgets of the training, by commas.")] = "100_352",
    rows: Annotated[int, typer.Option(min=1, help="Held out, of each text.")] = 32,
    conversations: Annotated[bool, typer.Option(help="Half of what is read are the subject's conversations.")] = False,
    set_: Annotated[list[str], typer.Option("--set", help="Of the recipe; repeatable.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Artefacts, the stages that they share, and the table.")] = RUNS,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    from upq.run.api import quantize
    from upq.run.recipe import Recipe

    folder, budgets = out / subject, [0, *map(int, tokens.split(","))]
    chosen, train, texts = prepared(subject, folder, tokens=max(budgets), rows=rows)
    talks = chosen.train.get("conversations") if conversations else None
    if conversations and talks is None:
        raise SystemExit(f"{subject} has no conversations of its own; leave --conversations out")
    sources = [{"path": str(path), "weight": 1} for path in (train, talks) if path is not None]
    shared = ["generate=null", *chosen.overrides, "data.validation=32", f"data.sources={json.dumps(sources)}", *set_]
    blocks = [f"int2.samples={samples}", f"int2.method.iterations={iterations}"]
    made: dict[str, list[str]] = {"nearest": ["distill=null", "int2.method=rtn"]}
    made |= {str(budget): [*blocks, f"distill.tokens={budget}"] for budget in budgets}
    lines = list[dict[str, Any]]()
    for name, own in made.items():
        quantize(chosen.model, folder / name, Recipe.load("default", [*shared, *own]), work=folder / "work")
        said = json.loads((folder / name / "upq.json").read_text())
        figures = judge(folder / name, chosen.model, texts, None, device="cpu")
        learns = name != "nearest"
        lines.append(
            {
                "row": name,
                "rows": rows,
                "settings": " ".join([*["conversations"] * conversations, *set_]),
                "samples": samples if learns else None,
                "iterations": iterations if learns else None,
                "tokens": int(name) if learns else None,
                "bits_per_weight": said["metrics"]["artifact"]["bits_per_weight"],
                "minutes": sum(said["seconds"].get(stage, 0.0) for stage in ("int2", "distill")) / 60,
                "peak_memory_bytes": said["peak_memory_bytes"],
                **figures,
            }
        )
        write_csv(folder / "table.csv", lines)
    console = make_console()
    table_of(subject, lines).show(console)
    best = lines[-1]["kld"] / lines[0]["kld"]
    shown = [Figure(f"KL on {subject}, trained over nearest", best, "", "<= 0.5", best <= 0.5)]
    show_figures(shown, console)
    if json_file:
        write_figures(shown, json_file)


def table_of(subject: str, lines: list[dict[str, Any]]) -> Table:
    """Of the lines of `table.csv`, as they are made or read again."""
    texts = [key.removeprefix("kld_") for key in lines[0] if key.startswith("kld_") and not key.endswith("stderr")]
    head = ("2 bits", "bits a weight", "minutes", "KL", "perplexity", "top-1")
    head += tuple(f"{what}, {text}" for text in texts for what in ("KL", "perplexity"))
    rows = []
    for line in lines:
        values = {
            key: float(value)
            for key, value in line.items()
            if value not in (None, "") and key not in ("row", "settings")
        }
        cells = [_label(values), f"{values['bits_per_weight']:.2f}", f"{values['minutes']:.0f}"]
        for which in ("", *(f"_{text}" for text in texts)):
            cells += [
                f"{values[f'kld{which}']:.3f} ± {values[f'kld{which}_stderr']:.3f}",
                f"{values[f'ppl{which}']:,.1f}",
            ]
            cells += [f"{values['top1']:.1%}"] if not which else []
        rows.append(tuple(cells))
    own = {which: f"{float(lines[0][f'original_ppl{which}']):.1f}" for which in ("", *(f"_{text}" for text in texts))}
    original = ["original", "32.00", "", "0", own[""], "100 %", *(c for text in texts for c in ("0", own[f"_{text}"]))]
    rows.insert(0, tuple(original))
    return Table(subject, head, tuple(rows))


def _label(values: dict[str, float]) -> str:
    if "tokens" not in values:
        return "nearest rounding"
    blocks = f"blocks, {values['samples']:.0f} rows, {values['iterations']:.0f} iterations"
    return f"and {values['tokens']:,.0f} tokens of training" if values["tokens"] else blocks


if __name__ == "__main__":
    app()

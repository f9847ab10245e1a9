"""Whether `upq compare` tells two seeds of one recipe apart: `python benchmarks/seeds.py --json seeds.json`

The reference model is quantised with seeds 0 and 1, and once by rounding to the nearest level. All three answer a large
set of items; it is cut into draws that share no item, and each draw gets the verdicts of `upq compare`, Holm's
correction among them. A finished artefact is not made again, and kept answers are not asked again.

Two seeds are two models. Each has errors of its own, so their true difference is small and not zero, and a test that
has enough items finds it. The table has the difference over all draws together beside the verdicts of the draws. Its
last column is the test's own error: in each item the two models are swapped by a coin, so that there is no difference,
and the share of draws is counted in which one is shown all the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import typer

import _corpora
from _subjects import ROOT, named
from _table import Figure, Table, make_console, show_figures, write_figures
from upq.evals.paired import LEVEL, NO_DIFFERENCE
from upq.reports.comparison import Measured, Request, together

RUNS = ROOT / "runs" / "seeds"
LEAST = 0.9  # of the draws show no difference between two seeds: 18 of 20
SWAPS = 5  # coins thrown for each draw
_HELDOUT = 15  # seed of documents that no training has
_TASKS = ("mini_mmlu", "mini_ifeval")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Size:
    """Items of one draw."""

    draws: int
    questions: int  # of each subject
    requests: int
    rows: int

    def slice(self, measured: Measured, draw: int) -> Measured:
        """The items of one draw: those whose number in their task lies in its stretch."""
        part = Measured(measured.name, measured.path)
        for item in measured.items:
            each = self.questions if item.asked == "mini_mmlu" else self.requests
            if item.id // each == draw:
                part.items.append(item)
                part.scores.setdefault(f"{item.asked} {item.measure}", []).append(item.score)
        for measure, scores in measured.scores.items():
            if not measure.startswith(_TASKS):
                part.scores[measure] = scores[draw * self.rows : (draw + 1) * self.rows]
        return part


@app.command()
def main(
    draws: Annotated[int, typer.Option(min=1)] = 20,
    questions: Annotated[int, typer.Option(min=1, help="Of each of 7 subjects of mini_mmlu, a draw.")] = 12,
    requests: Annotated[int, typer.Option(min=1, help="Of mini_ifeval, a draw.")] = 24,
    rows: Annotated[int, typer.Option(min=1, help="Of 256 tokens of held-out text, a draw.")] = 8,
    tokens: Annotated[int, typer.Option(min=0, help="Of the training.")] = 30_000,
    set_: Annotated[list[str], typer.Option("--set", help="Of the recipe; repeatable.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Artefacts, texts and answers.")] = RUNS,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    from upq.run.quiet import quiet_libraries

    quiet_libraries()
    size = Size(draws, questions, requests, rows)
    seeds = _artefacts(out, tokens, set_)
    measured = _measured(list(seeds.values()), size, out)
    first, second, nearest = (
        Measured(name, m.path, m.scores, m.items) for name, m in zip(seeds, measured, strict=True)
    )
    console, figures, lines = make_console(), list[Figure](), list[tuple[str, ...]]()
    for a, b, seeded in ((first, second, True), (nearest, first, False)):
        tries = [_verdicts([size.slice(a, draw), size.slice(b, draw)]) for draw in range(draws)]
        coins = random.Random(0)
        swapped = [
            _verdicts(_swapped(size.slice(a, draw), size.slice(b, draw), coins))
            for draw in range(draws)
            for _ in range(SWAPS * seeded)
        ]
        whole = {pair["measure"]: pair for pair in together([a, b], Request())["pairs"]}
        for measure, pair in whole.items():
            items = len(size.slice(a, 0).scores[measure])
            same = sum(not found[measure] for found in tries)
            chance = sum(found[measure] for found in swapped) / len(swapped) if swapped else None
            lines.append(
                (
                    f"{a.name} → {b.name}: {measure}",
                    f"{items}",
                    f"{same} of {draws}",
                    f"{pair['difference']:+.4f} ({pair['low']:+.4f} to {pair['high']:+.4f})",
                    f"{pair['items']:,}",
                    "–" if chance is None else f"{chance:.1%}",
                )
            )
        tasks = sum(any(shown for name, shown in found.items() if name.startswith(_TASKS)) for found in tries)
        unit, same = f"of {draws}", draws - tasks
        if seeded:
            ok, by_chance = same >= LEAST * draws, sum(any(found.values()) for found in swapped) / len(swapped)
            name = "two seeds, tries on both tests without a difference"
            figures.append(Figure(name, same, unit, f">= {LEAST * draws:g}", ok))
            figures.append(Figure("swapped by a coin, tries with one", 100 * by_chance, "%", "none", True))
        else:
            name = "nearest and default, tries on both tests with one"
            figures.append(Figure(name, tasks, unit, f"{draws}", tasks == draws))
    head = ("models and measure", "items a draw", "no difference shown", "over all draws", "items", "swapped")
    Table(f"{draws} draws, {LEVEL:.0%}", head, tuple(lines)).show(console)
    show_figures(figures, console)
    if json_file:
        write_figures(figures, json_file)


def _artefacts(out: Path, tokens: int, settings: Sequence[str]) -> dict[str, Path]:
    """By name, seeds first. One thread of one machine makes them; the text is the reference model's own world."""
    from upq.run.api import quantize
    from upq.run.recipe import Recipe

    subject = named("reference")
    text = _corpora.write(
        "documents", out / "train.jsonl", tokens=max(tokens, 200_000), model=subject.model, device="cpu"
    )
    small = ["generate=null", *subject.overrides, "int2.samples=64", "int2.method.iterations=30"]
    small += [f"distill.tokens={tokens}", *settings]
    made = {f"seed {seed}": [*small, f"seed={seed}"] for seed in (0, 1)}
    made["nearest"] = ["generate=null", *subject.overrides, "int2.method=rtn", "distill=null"]
    for name, own in made.items():
        quantize(subject.model, out / name.replace(" ", "-"), Recipe.load("default", own), data=text)
    return {name: out / name.replace(" ", "-") for name in made}


def _measured(models: Sequence[Path], size: Size, out: Path) -> list[Measured]:
    """All items of all draws, asked as `upq compare` does; of the world's tests more than the package has."""
    from upq.core.progress import Silent
    from upq.data import load_eval_text
    from upq.evals import mini
    from upq.files.atomic import atomic_write
    from upq.model.loading import load_tokenizer
    from upq.reports import comparison
    from upq.world import World, documents

    reference = named("reference").model
    rows, text, tokenizer = size.draws * size.rows, out / "heldout.jsonl", load_tokenizer(reference)
    lines = (json.dumps({"text": each}) for each in documents(World(), rows * 256 // 16, _HELDOUT))
    atomic_write(text, "\n".join(lines))
    ours = {text: load_eval_text(text, tokenizer, 256)[:rows]}
    assert len(ours[text]) == rows
    request = Request(
        tasks=_TASKS, texts=(text,), against=str(reference), batch_size=16, answers=out / "answers"
    )  # the folder keeps answers, so a run that was stopped goes on
    with (
        patch.object(mini, "QUESTIONS", size.draws * size.questions),
        patch.object(mini, "REQUESTS", size.draws * size.requests),
        patch.object(comparison, "load_eval_text", lambda path, *_: ours[path]),
    ):
        return comparison.measure([str(model) for model in models], request, Silent())


def _verdicts(pair: Sequence[Measured]) -> dict[str, bool]:
    """By measure, whether `upq compare` shows a difference."""
    return {each["measure"]: each["verdict"] != NO_DIFFERENCE for each in together(pair, Request())["pairs"]}


def _swapped(a: Measured, b: Measured, coins: random.Random) -> list[Measured]:
    """The same scores, of each item the two models' in an order that a coin decides."""
    parts = Measured(a.name, a.path), Measured(b.name, b.path)
    for measure in a.scores:
        pairs = [
            (x, y) if coins.random() < 0.5 else (y, x)
            for x, y in zip(a.scores[measure], b.scores[measure], strict=True)
        ]
        for part, scores in zip(parts, zip(*pairs, strict=True), strict=True):
            part.scores[measure] = list(scores)
    return list(parts)


if __name__ == "__main__":
    app()

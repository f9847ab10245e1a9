"""`upq demo`: the main job on the model that comes with UPQ, with scores and answers before and after, and a report."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upq.core.paths import local

if TYPE_CHECKING:
    from rich.table import Table

    from upq.artifact.manifest import Manifest

DOCUMENTS = 30_000
SUITES = {"mini_mmlu": ("knows", "acc"), "mini_ifeval": ("obeys", "prompt_level_strict_acc")}
ASKED, SHOWN = 24, 3  # prompts of mini_ifeval that are answered, and of them side by side
EVERY = 1.0  # seconds between two lines in a pipe

Scores = dict[str, dict[str, float]]


def demo(
    out: Annotated[Path, typer.Option(help="Where text and artefacts go; what is there is kept.")] = Path("demo"),
    recipe: Annotated[str, typer.Option(help="Recipe of the package or a YAML file.")] = "demo",
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each test (for a quick look).")] = None,
) -> None:
    """Quantise a small instruct model to 2 bits on documents and its own words, and put the same tests to both."""
    from upq.run.console import console, styled
    from upq.run.reporter import duration, loading, reporter

    shown = console()
    shown.print("loading torch and transformers")
    with loading():
        from upq.core.precision import to_compute_dtype
        from upq.core.signals import Stop
        from upq.evals import evaluate_tasks, mini
        from upq.files.atomic import atomic_write, write_errors
        from upq.kernels import computing
        from upq.model.loading import load_model, load_tokenizer
        from upq.reports.facts import EVALS
        from upq.reports.make import make
        from upq.reports.page import check_packages
        from upq.run.api import quantize
        from upq.run.quiet import quiet_libraries
        from upq.run.recipe import Recipe
        from upq.world import World
        from upq.world.answers import answers
        from upq.world.corpus import write_corpus
        from upq.world.reference import REFERENCE

    check_packages()
    quiet_libraries()
    out = local(out)
    artifact, nearest, corpus = (out / name for name in ("int2", "int2-nearest", "documents.jsonl"))
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    if not corpus.is_file():
        shown.print(f"writing {DOCUMENTS:,} documents about an invented world")
        write_corpus(corpus, World(), n=DOCUMENTS, seed=1)

    shown.rule("1. FP → 2 bits, with documents and conversations that it writes itself", align="left")
    with Stop().listening() as stop, reporter(shown, every=EVERY) as progress:
        manifest = quantize(REFERENCE, artifact, recipe, data=corpus, progress=progress, stop=stop)
    rounding = Recipe.load(recipe, ["int4=null", "int2.method=rtn", "int2.grid=affine", "distill.tokens=0"])
    shown.print("the same by rounding to the nearest level, to compare with")
    with reporter(shown, every=EVERY) as progress:
        plain = quantize(REFERENCE, nearest, rounding, data=corpus, progress=progress)

    shown.rule("2. does it still know, does it still obey?", align="left")
    tokenizer = load_tokenizer(REFERENCE)
    asked = list(mini.ifeval_docs(split="validation")["test"])[:ASKED]
    scores: dict[str, Scores] = {}
    said: dict[str, list[str]] = {}
    for name, path in (("original", REFERENCE), ("2 bits, nearest", nearest), ("2 bits, UPQ", artifact)):
        with reporter(shown, every=EVERY) as progress, computing("reference"):  # it compares weights, not kernels
            progress.note(f"testing {name}")
            model = to_compute_dtype(load_model(path))
            scores[name] = evaluate_tasks(model, tokenizer, list(SUITES), limit=limit, batch_size=64, progress=progress)
            progress.note(f"{name} answers {len(asked)} requests")
            said[name] = answers(model, tokenizer, [doc["prompt"] for doc in asked])
    for key, name in (("source", "original"), ("artifact", "2 bits, UPQ")):
        atomic_write(artifact / EVALS[key], json.dumps({"tasks": scores[name]}, indent=2))
    with reporter(shown, every=EVERY) as progress:
        _, page = make(artifact, progress=progress)
    atomic_write(artifact / "report.html", page)

    shown.print(_scores(scores, {"2 bits, nearest": plain, "2 bits, UPQ": manifest}))
    good = {
        name: [
            mini.ifeval_results(doc, [text])["prompt_level_strict_acc"] for doc, text in zip(asked, texts, strict=True)
        ]
        for name, texts in said.items()
    }
    shown.print(_answers([doc["prompt"] for doc in asked], said, good))
    shown.print(f"quantised in {duration(sum(manifest.seconds.values()))}")
    shown.print(styled("report: ", (str(artifact / "report.html"), "bold")), soft_wrap=True)
    shown.print(styled("talk to it: ", (f"upq chat {shlex.quote(str(artifact))}", "bold")), soft_wrap=True)


def _scores(scores: dict[str, Scores], manifests: dict[str, Manifest]) -> Table:
    from upq.cli.console import size, table

    rows = []
    for name, found in scores.items():
        manifest = manifests.get(name)
        figures = (manifest or next(iter(manifests.values()))).metrics["artifact" if manifest else "source"]
        kld = figures.get("kld")
        rows.append(
            [
                name,
                size(figures["bytes"]),
                f"{figures['bits_per_weight']:.2f}",
                "–" if kld is None else f"{kld:.4f}",
                *(
                    f"{100 * found[suite][metric]:.1f} ± {100 * found[suite][metric + '_stderr']:.1f} %"
                    for suite, (_, metric) in SUITES.items()
                ),
            ]
        )
    titles = [word for word, _ in SUITES.values()]
    return table("", ["model", "size", "bits", "KL", *titles], rows)


def _answers(prompts: list[str], said: dict[str, list[str]], good: dict[str, list[bool]]) -> Table:
    """Prompts with every model's answer: first those that the first and the last model obey and the others do not."""
    from rich.table import Table

    first, *between, last = good
    broken = [
        i
        for i in range(len(prompts))
        if good[first][i] and good[last][i] and not any(good[name][i] for name in between)
    ]
    others = [i for i in range(len(prompts)) if i not in broken]
    made = Table(
        title=f"{len(broken)} of {len(prompts)} requests that rounding breaks and UPQ does not",
        title_justify="left",
        title_style="bold",
        show_lines=True,
        header_style="bold",
    )
    made.add_column("asked")
    for name in said:
        made.add_column(name)
    for i in [*broken, *others][:SHOWN]:
        made.add_row(prompts[i], *(f"{'✓' if good[name][i] else '✗'} {texts[i]}" for name, texts in said.items()))
    return made

"""`upq demo`: the main job on the model that comes with UPQ, with scores and answers before and after."""

from __future__ import annotations

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
PROMPTS = 3  # of mini_ifeval, answered side by side

Scores = dict[str, dict[str, float]]


def demo(
    out: Annotated[Path, typer.Option(help="Where text and artefacts go; what is there is kept.")] = Path("demo"),
    recipe: Annotated[str, typer.Option(help="Recipe of the package or a YAML file.")] = "demo",
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each test (for a quick look).")] = None,
) -> None:
    """Quantise a small instruct model to 2 bits on documents and its own words, and put the same tests to both."""
    from upq.run.api import quantize
    from upq.run.console import console, styled
    from upq.run.reporter import duration, loading, reporter

    with loading():
        from upq.core.precision import to_compute_dtype
        from upq.core.signals import Stop
        from upq.evals import evaluate_tasks, mini
        from upq.files.atomic import write_errors
        from upq.kernels import computing
        from upq.model.loading import load_model, load_tokenizer
        from upq.run.quiet import quiet_libraries
        from upq.run.recipe import Recipe
        from upq.world import World
        from upq.world.answers import answers
        from upq.world.corpus import write_corpus
        from upq.world.reference import REFERENCE

    quiet_libraries()
    shown = console()
    out = local(out)
    artifact, nearest, corpus = (out / name for name in ("int2", "int2-nearest", "documents.jsonl"))
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    if not corpus.is_file():
        write_corpus(corpus, World(), n=DOCUMENTS, seed=1)

    shown.rule("1. FP → 2 bits, with documents and conversations that it writes itself", align="left")
    with Stop().listening() as stop:
        manifest = quantize(REFERENCE, artifact, recipe, data=corpus, stop=stop)
    rounding = Recipe.load(recipe, ["int4=null", "int2.method=rtn", "int2.grid=affine", "distill.tokens=0"])
    shown.print("the same by rounding to the nearest level, to compare with")
    plain = quantize(REFERENCE, nearest, rounding, data=corpus)

    shown.rule("2. does it still know, does it still obey?", align="left")
    tokenizer = load_tokenizer(REFERENCE)
    prompts = mini.ifeval_docs(split="validation")["test"]["prompt"][:PROMPTS]
    scores: dict[str, Scores] = {}
    said: dict[str, list[str]] = {}
    for name, path in (("original", REFERENCE), ("2 bits, nearest", nearest), ("2 bits, UPQ", artifact)):
        with reporter(shown) as progress, computing("reference"):  # it compares weights, not kernels
            progress.note(f"testing {name}")
            model = to_compute_dtype(load_model(path))
            scores[name] = evaluate_tasks(model, tokenizer, list(SUITES), limit=limit, batch_size=64, progress=progress)
            said[name] = answers(model, tokenizer, prompts)
    shown.print(_scores(scores, {"2 bits, nearest": plain, "2 bits, UPQ": manifest}))
    shown.print(_answers(said, prompts))
    shown.print(f"quantised in {duration(sum(manifest.seconds.values()))}")
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


def _answers(said: dict[str, list[str]], prompts: list[str]) -> Table:
    """Each prompt with every model's answer."""
    from rich.table import Table

    made = Table(show_lines=True, header_style="bold")
    made.add_column("asked")
    for name in said:
        made.add_column(name)
    for i, prompt in enumerate(prompts):
        made.add_row(prompt, *(found[i] for found in said.values()))
    return made

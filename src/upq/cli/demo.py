"""`upq demo`: the main job on a model that this machine trains for itself, with answers before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from upq.artifact import Manifest
    from upq.demo.quiz import QuizResult

QUESTIONS = 120
SHOWN = ("ask", "capitals", "repeat")  # kinds of which one prompt each is answered side by side
DOCUMENTS = 12_000


def demo(
    out: Annotated[Path, typer.Option(help="Where model, text and artefact go; what is there is kept.")] = Path("demo"),
    recipe: Annotated[str, typer.Option(help="Recipe of the package or a YAML file.")] = "demo",
) -> None:
    """Train a small instruct model, quantise it to 2 bits on plain documents, and put the same quiz to both."""
    from rich.console import Console

    from upq import pipeline
    from upq.console import reporter
    from upq.data.world import quiz
    from upq.demo.corpus import write_corpus
    from upq.demo.model import DemoConfig, train_demo_model
    from upq.demo.quiz import run_quiz
    from upq.loading import load_model, load_tokenizer
    from upq.quiet import quiet_libraries
    from upq.recipe import Recipe, Source

    quiet_libraries()
    console = Console()
    config = DemoConfig()
    model, artifact, nearest, corpus = (out / name for name in ("model", "int2", "int2-nearest", "documents.jsonl"))
    out.mkdir(parents=True, exist_ok=True)

    console.rule("1. a small instruct model, trained from scratch on an invented world", align="left")
    with reporter(console) as progress:
        train_demo_model(model, config=config, progress=progress)
    if not corpus.is_file():
        write_corpus(corpus, config.world, n=DOCUMENTS, seed=config.seed + 1)

    console.rule("2. FP → INT4 → INT2, with plain documents only: it never sees a conversation", align="left")
    chosen = Recipe.load(recipe)
    chosen = chosen.model_copy(update={"data": chosen.data.model_copy(update={"sources": (Source(path=str(corpus)),)})})
    with reporter(console) as progress:
        manifest = pipeline.quantize(model, chosen, artifact, progress=progress)
    rounding = Recipe.load(recipe, ["int4=null", "int2.method=rtn", "distill.tokens=0"])
    rounding = rounding.model_copy(update={"data": chosen.data})
    plain = pipeline.quantize(model, rounding, nearest)

    console.rule("3. does it still know, does it still obey?", align="left")
    items = quiz(config.world, QUESTIONS, config.seed)
    tokenizer = load_tokenizer(model)
    results: dict[str, QuizResult] = {}
    for name, path in (("original", model), ("2 bits, nearest", nearest), ("2 bits, UPQ", artifact)):
        with console.status(f"{QUESTIONS} questions to {name}"):
            results[name] = run_quiz(load_model(path), tokenizer, items)
    console.print(_scores(results, {"2 bits, nearest": plain, "2 bits, UPQ": manifest}))
    console.print(_answers(results, [item.messages[-1]["content"] for item in items], [item.kind for item in items]))
    console.print(f"talk to it: [bold]upq chat {artifact}[/bold]", highlight=False)


def _scores(results: dict[str, QuizResult], manifests: dict[str, Manifest]) -> Table:
    from upq.console import size, table

    rows = []
    for name, result in results.items():
        manifest = manifests.get(name)
        figures = (manifest or next(iter(manifests.values()))).metrics["artifact" if manifest else "source"]
        kld = figures.get("kld")
        rows.append(
            [
                name,
                size(figures["bytes"]),
                f"{figures['bits_per_weight']:.2f}",
                f"{figures['ppl']:.3f}",
                "–" if kld is None else f"{kld:.4f}",
                f"{result.knows:.0%}",
                f"{result.obeys:.0%}",
            ]
        )
    return table("", ["model", "size", "bits a weight", "perplexity", "KL", "knows", "obeys"], rows)


def _answers(results: dict[str, QuizResult], prompts: list[str], kinds: list[str]) -> Table:
    """A prompt of each kind in SHOWN with every model's answer."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(show_lines=True, header_style="bold")
    made.add_column("asked")
    for name in results:
        made.add_column(name)
    for kind in SHOWN:
        i = kinds.index(kind)
        made.add_row(escape(prompts[i]), *(escape(result.answers[i]) for result in results.values()))
    return made

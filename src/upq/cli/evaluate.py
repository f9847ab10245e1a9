"""`upq eval`: how good and how small a model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upq.files.target import Target

if TYPE_CHECKING:
    from upq.run.api import Figures


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory or hub id: full precision, fake-quantised or packed.")
    ],
    against: Annotated[str | None, typer.Option(help="Teacher to compare with on --text: directory or hub id.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file for perplexity and distance from the teacher.")] = None,
    separator: Annotated[
        str, typer.Option(help="Documents in --text: none (the file is one) or blank_line (between two).")
    ] = "none",
    seq_len: Annotated[
        int | None, typer.Option(min=8, help="Tokens a row of --text; default 2048 or the context.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas: mmlu,ifeval,arc_easy.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local files of tasks (docs/tasks.md), not the hub's.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; default as in lm-eval.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task (of each subject for mmlu).")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Programs written for each problem of humaneval or code.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Of these programs; default 0 for one, 0.2 for several.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows or questions computed at a time.")] = 4,
    answers: Annotated[
        Path | None, typer.Option(help="Keep answers to tasks in this file; the same command goes on where it stopped.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compute: Annotated[
        str, typer.Option(help="Products of a packed MODEL: reference (exact), w2a16, or w2a8 (as in use on the CPU).")
    ] = "reference",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")] = None,
) -> None:
    """Measure MODEL on a text (perplexity, distance from a teacher) and on tasks; at least one of the two."""
    target = Target.of(json_file)

    from upq.cli.console import table
    from upq.run.api import evaluate
    from upq.run.console import console

    figures = evaluate(
        model,
        against=against,
        text=text,
        separator=separator,
        seq_len=seq_len,
        tasks=tasks or (),
        data_dir=data_dir,
        fewshot=fewshot,
        limit=limit,
        samples=samples,
        temperature=temperature,
        batch_size=batch_size,
        answers=answers,
        device=device,
        compute=compute,
    )
    console().print(table(model, ["measure", "value"], _rows(figures, limit)))
    target.write(figures)


def _rows(figures: Figures, limit: int | None) -> list[list[str]]:
    from upq.cli.console import size

    rows = [["bits per weight", f"{figures['bits_per_weight']:.4g}"], ["weight files", size(figures["bytes"])]]
    if "compute" in figures:
        rows.append(["computed by", figures["compute"]])
    rows.append(["computed in", figures["dtype"]])
    if "ppl" in figures:
        rows.append(["perplexity", _with_error(figures["ppl"], figures.get("ppl_stderr"), ".4f")])
    if "kld" in figures:
        teacher = _with_error(figures["teacher_ppl"], figures.get("teacher_ppl_stderr"), ".4f")
        rows.append(["perplexity of the teacher", teacher])
        rows.append(["KL divergence", _with_error(figures["kld"], figures.get("kld_stderr"), ".4f")])
        rows.append(["top-1 agreement", _with_error(figures["top1"], figures.get("top1_stderr"), ".2%")])
    for name, metrics in figures.get("tasks", {}).items():
        asked = f" (first {limit} of each)" if limit else ""
        for metric, value in metrics.items():
            if metric == "samples" or "_stderr" in metric:
                continue
            # lm-eval writes acc_stderr, and exact_match_stderr,filter where there is a filter
            stem, comma, filter_name = metric.partition(",")
            stderr = metrics.get(f"{stem}_stderr{comma}{filter_name}")
            # scores are shares, save for the likes of perplexity
            style = ".2%" if 0 <= value <= 1 else ".4g"
            rows.append([f"{name} {metric}{asked}", _with_error(value, stderr, style)])
    return rows


def _with_error(value: float, stderr: float | None, style: str) -> str:
    return f"{value:{style}}" if stderr is None else f"{value:{style}} ± {stderr:{style}}"

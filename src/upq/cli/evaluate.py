"""`upq eval`: how good and how small a model is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from upq.core.errors import UPQError


def evaluate(
    model: Annotated[str, typer.Argument(help="Directory or hub id: full precision, fake-quantised or packed.")],
    against: Annotated[str | None, typer.Option(help="Teacher to compare with on --text: directory or hub id.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file for perplexity and distance from the teacher.")] = None,
    separator: Annotated[
        str, typer.Option(help="Documents in --text: none (the file is one) or blank_line (between two).")
    ] = "none",
    seq_len: Annotated[
        int | None, typer.Option(min=8, help="Tokens a row of --text; default 2048 or the context.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas: mmlu,ifeval.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local files of mmlu and ifeval, in place of the hub.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; default as in lm-eval.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task (of each subject for mmlu).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows or questions computed at a time.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compute: Annotated[
        str, typer.Option(help="Products of a packed MODEL: reference (exact), w2a16, or w2a8 (as in use on the CPU).")
    ] = "reference",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")] = None,
) -> None:
    """Measure MODEL on a text (perplexity, distance from a teacher) and on tasks; at least one of the two."""
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    _check_request(text, names, against, separator, data_dir, json_file)

    from rich.console import Console
    from rich.markup import escape

    from upq import kernels
    from upq.artifact.manifest import MANIFEST, read_manifest, verify
    from upq.artifact.size import model_size, weights_bytes
    from upq.cli.console import reporter, table
    from upq.cli.quiet import quiet_libraries
    from upq.evals import evaluate_tasks, evaluate_text
    from upq.files.atomic import atomic_write
    from upq.model.loading import load_model, load_tokenizer

    if compute not in kernels.COMPUTES:
        raise UPQError(f"--compute must be one of {', '.join(kernels.COMPUTES)}, got {compute!r}")
    target = _device(device)
    with kernels.computing(compute):
        kernels.compute(target)  # not every device has them all
    quiet_libraries()
    errors = Console(stderr=True)
    with errors.status(f"loading {model}"):
        if (Path(model) / MANIFEST).is_file():  # figures of a damaged file would be taken for the method's
            verify(Path(model), read_manifest(Path(model)))
        tokenizer = load_tokenizer(model)
        student = load_model(model, device=target)
    figures: dict[str, Any] = {
        "bits_per_weight": model_size(student).bits_per_weight,
        "bytes": weights_bytes(model),
    }
    if getattr(student, "hf_quantizer", None) is not None:
        figures["compute"] = compute  # what the figures below are figures of
    if text is not None:
        from upq.data import load_eval_text

        context = int(student.config.max_position_embeddings)
        between = cast("Literal['none', 'blank_line']", separator)
        tokens_NT = load_eval_text(text, tokenizer, seq_len or min(2048, context), separator=between)
        teacher = None
        if against is not None:
            with errors.status(f"loading {against}"):
                teacher = load_model(against, device=target)
        with kernels.computing(compute), reporter(errors) as progress:
            progress.plan({"text": (len(tokens_NT), 1.0)})
            progress.start("text")
            measured = evaluate_text(student, tokens_NT, teacher=teacher, batch_size=batch_size, progress=progress)
        figures |= {key: value for key, value in dataclasses.asdict(measured).items() if value is not None}
        # room for the tasks
        del teacher
    if names:
        with kernels.computing(compute):
            figures["tasks"] = evaluate_tasks(
                student,
                tokenizer,
                names,
                data_dir=data_dir,
                limit=limit,
                batch_size=batch_size,
                num_fewshot=fewshot,
                progress=reporter(errors),  # for its notes: lm-eval has bars of its own
            )
    Console().print(table(escape(model), ["measure", "value"], _rows(figures, limit)))
    if json_file is not None:
        atomic_write(json_file, json.dumps(figures, indent=2) + "\n")


def _check_request(
    text: Path | None,
    names: list[str],
    against: str | None,
    separator: str,
    data_dir: Path | None,
    json_file: Path | None,
) -> None:
    """Everything that can be wrong without a model, before one is loaded."""
    if text is None and not names:
        raise UPQError("nothing to measure: give --text FILE, --tasks mmlu,ifeval, or both")
    if text is not None and not text.is_file():
        raise UPQError(f"--text {text}: no such file")
    if against is not None and text is None:
        raise UPQError("--against compares on a text: give --text FILE as well")
    if separator not in ("none", "blank_line"):
        raise UPQError(f"--separator must be none or blank_line, got {separator!r}")
    if data_dir is not None and not data_dir.is_dir():
        raise UPQError(f"--data-dir {data_dir}: no such directory")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UPQError(f"--json {json_file}: no such directory {json_file.absolute().parent}; create it first")


def _device(name: str) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UPQError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UPQError("--device cuda: torch finds no CUDA device; use --device cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _rows(figures: dict[str, Any], limit: int | None) -> list[list[str]]:
    from upq.cli.console import size

    rows = [["bits per weight", f"{figures['bits_per_weight']:.4g}"], ["weight files", size(figures["bytes"])]]
    if "compute" in figures:
        rows.append(["computed by", figures["compute"]])
    if "ppl" in figures:
        rows.append(["perplexity", f"{figures['ppl']:.4f}"])
    if "kld" in figures:
        rows.append(["perplexity of the teacher", f"{figures['teacher_ppl']:.4f}"])
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

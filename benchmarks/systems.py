"""Related systems in one engine: methods, windows, annealing, widths. `python benchmarks/systems.py`

Every row is the block-wise stage of one recipe (`ROWS`), on one subject, the same text, rows and steps, without
training after it, in a process of its own. It is judged on held-out text against the original. A finished row is a file
and is not run again while its recipe and the model are what they were. The page docs/systems.md is made of the finished
rows. Time is of one processor: give OMP_NUM_THREADS=1 on a machine that does other work.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import _corpora
from _rows import run_again
from _subjects import ROOT, SUBJECTS, Subject, named
from _table import Table, make_console, read_csv, spread, write_csv

if TYPE_CHECKING:
    from upq.run.recipe import Recipe

RUNS = ROOT / "runs" / "systems"
DOCS = ROOT / "docs"
_HELDOUT_ROWS = 64
_TOKENS = 100_000  # of the text that calibration rows are drawn from


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    method: dict[str, Any]
    stage: dict[str, Any]
    claim: str = ""  # what its authors say of it
    widths: dict[str, Any] | None = None


def _row(label: str, name: str, claim: str = "", *, widths: dict[str, Any] | None = None, **options: Any) -> Row:
    """Options of the stage begin with `stage_`."""
    stage = {key.removeprefix("stage_"): value for key, value in options.items() if key.startswith("stage_")}
    own = {key: value for key, value in options.items() if not key.startswith("stage_")}
    return Row(label, {"name": name, **own}, stage, claim, widths)


_BLOCK_AP: dict[str, Any] = {"relative": True, "lr": 3e-3, "scale_lr": 3e-3}
_ROUND: dict[str, Any] = {"relative": True}
# EfficientQAT's rates (`upq/run/recipes/efficientqat.yaml`).
_PUBLISHED: dict[str, Any] = {"scale": "max", "lr": 1e-3, "scale_lr": 7e-3, "zero_lr": 1e-4, "final_lr": 0.05}
_BOOKS: dict[str, Any] = {"stage_grid": "books", "stage_group_size": -1}

ROWS: dict[str, Row] = {
    "rtn": _row("nearest rounding, searched scale", "rtn", scale="mse"),
    "gptq": _row("GPTQ", "gptq", scale="hessian", relative=True),
    "flexround": _row("FlexRound", "flexround", relative=True),
    "block_ap": _row("Block-AP, as in `demo`", "block_ap", **_BLOCK_AP),
    "efficientqat": _row(
        "Block-AP, as in `efficientqat`", "block_ap", "best of its table at 2 bits", stage_grid="affine", **_PUBLISHED
    ),
    "brecq": _row(
        "BRECQ: `adaround`, penalty, scale fixed",
        "adaround",
        "W2 keeps a ResNet that nearest rounding destroys",
        harden="penalty",
        learn_scale=False,
        **_ROUND,
    ),
    "brecq-scale": _row("BRECQ with learned scale", "adaround", harden="penalty", **_ROUND),
    "tesseraq": _row(
        "TesseraQ: `adaround`, progressive, scale learned",
        "adaround",
        "below Block-AP's perplexity at W2g128 (6.82, 7.17 on Llama-2-7B)",
        **_ROUND,
    ),
    "lora-round": _row("CBQ's LoRA-rounding, rank 8, one block", "lora_round", **_ROUND),
    "cbq": _row(
        "CBQ: LoRA-rounding, windows of 2, overlap 1",
        "lora_round",
        "below OmniQuant at W2 (12.1, 37.4 on Llama-2-7B)",
        stage_window=2,
        stage_overlap=1,
        **_ROUND,
    ),
    "cbq-truncate": _row(
        "CBQ with truncated outliers", "lora_round", stage_window=2, stage_overlap=1, stage_truncate=True, **_ROUND
    ),
    "slider": _row(
        "SliderQuant's windows (2, ends grow to 2), Block-AP",
        "block_ap",
        "below fixed windows (10.5, 12.1)",
        stage_window=2,
        stage_overlap=1,
        stage_grow=2,
        **_BLOCK_AP,
    ),
    "windows": _row("windows of 2, overlap 1, Block-AP", "block_ap", stage_window=2, stage_overlap=1, **_BLOCK_AP),
    "annealed": _row(
        "MREM's annealed inputs (half of the steps), Block-AP",
        "block_ap",
        "3.4 points on MNLI at 250 steps",
        stage_annealing=0.5,
        **_BLOCK_AP,
    ),
    "apart": _row(
        "MREM's blocks in parallel (original's inputs), Block-AP",
        "block_ap",
        "within 0.1 points of one after another",
        stage_inputs="original",
        **_BLOCK_AP,
    ),
    "aqlm": _row(
        "AQLM: 2 books of 256, 4 rounds",
        "aqlm",
        "below all of its table at 2 bits (6.69 on Llama-2-7B)",
        relative=True,
        rounds=4,
        **_BOOKS,
    ),
    "aqlm-fit": _row("AQLM, without the block's tuning", "aqlm", relative=True, rounds=4, iterations=0, **_BOOKS),
    "gptq-16": _row("GPTQ, groups of 16", "gptq", scale="hessian", relative=True, stage_group_size=16),
    "block_ap-32": _row("Block-AP, as in `demo`, groups of 32", "block_ap", stage_group_size=32, **_BLOCK_AP),
    "block_ap-16": _row("Block-AP, as in `demo`, groups of 16", "block_ap", stage_group_size=16, **_BLOCK_AP),
    "slim": _row(
        "widths of mean 2.2 (2 and 3 bits), a scale a row, GPTQ",
        "gptq",
        "far below GPTQ at 2 bits (16.0, 60.5 on Llama-2-7B)",
        widths={"mean": 2.2, "choices": [2, 3]},
        scale="hessian",
        relative=True,
        stage_group_size=-1,
    ),
    "slim-block-ap": _row(
        "widths of mean 2.2, a scale a row, Block-AP",
        "block_ap",
        widths={"mean": 2.2, "choices": [2, 3]},
        stage_group_size=-1,
        **_BLOCK_AP,
    ),
}
_HEAD = """# Related systems, one engine

This page is made by `python benchmarks/systems.py` from `docs/results/systems_*.csv`. Each row is a block-wise stage;
no training follows. Text, rows, steps and batches are the same in all rows of a table. Windows take more steps in all,
because blocks are in several of them. Bits count everything but embedding and head. KL is KL(original‖model) in nats a
token on held-out text. ± is the standard deviation over seeds; a figure without it is of one seed. The last column has
what the authors of a system say of it, on their models; perplexities there are of WikiText-2."""
# Methods without steps.
_AT_ONCE = ("rtn", "gptq")


@dataclass(frozen=True)
class Study:
    """One subject, with all that the rows have in common."""

    subject: Subject
    out: Path
    iterations: int
    samples: int

    @property
    def folder(self) -> Path:
        return self.out / self.subject.name

    def text(self) -> Path:
        return self.subject.train.get("documents") or self.out / f"{self.subject.name}-documents.jsonl"

    def heldout(self) -> dict[str, Path]:
        return dict(self.subject.heldout) or {"documents": self.out / f"{self.subject.name}-heldout.jsonl"}

    def write_texts(self) -> None:
        kinds = {"documents": self.text(), "heldout": next(iter(self.heldout().values()))}
        for kind, path in kinds.items():
            if not path.is_file():
                _corpora.write(kind, path, tokens=_TOKENS, model=self.subject.model, device="cpu")

    def recipe(self, name: str, seed: int) -> Recipe:
        from upq.run.recipe import Recipe

        row = ROWS[name]
        steps = {} if row.method["name"] in _AT_ONCE else {"iterations": self.iterations, "batch_size": 4}
        stage = {"stage": "blockwise", "bits": 2, "grid": "seq", "group_size": 64, "samples": self.samples, **row.stage}
        stage["method"] = {**steps, **row.method}
        stages: dict[str, Any] = {"int2": stage}
        if row.widths is not None:
            shared = {key: stage[key] for key in ("grid", "group_size")}
            stages = {"widths": {**row.widths, **shared}, "int2": {**stage, "mixed": True}}
        data = {"seq_len": self.subject.seq_len, "sources": [{"path": str(self.text())}], "validation": 8}
        return Recipe.of({"seed": seed, "data": data, "stages": stages}, name)

    def key(self, name: str, seed: int) -> str:
        """Identity of a row's result: its recipe but for where files lie, and the model."""
        from upq.core.config import digest
        from upq.files.digests import digest_model_dir

        recipe = self.recipe(name, seed)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": ()})})
        return digest(recipe.model_dump(mode="json", exclude_defaults=True), digest_model_dir(self.subject.model))

    def file(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}@{seed}.json"

    def finished(self, name: str, seed: int) -> dict[str, Any] | None:
        file = self.file(name, seed)
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return found if found.get("key") == self.key(name, seed) else None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    subject: Annotated[str, typer.Option(help=f"One of: {', '.join(SUBJECTS)}.")] = "reference",
    only: Annotated[list[str], typer.Option(help="Rows: " + ", ".join(ROWS))] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    iterations: Annotated[int, typer.Option(min=1, help="Steps a block, or a window.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows.")] = 64,
    out: Annotated[Path, typer.Option(help="Finished rows.")] = RUNS,
    docs: Annotated[Path, typer.Option(help="Where the page and its figures go.")] = DOCS,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run what is missing, then write the page."""
    study = Study(named(subject), out.resolve(), iterations, samples)
    if worker:
        name, _, seed = worker.partition("@")
        run_row(study, name, int(seed))
        return
    study.subject.install()
    study.write_texts()
    console = make_console()
    if unknown := set(only) - ROWS.keys():
        raise SystemExit(f"no row {min(unknown)}; there are {', '.join(ROWS)}")
    for seed in range(seeds):
        for name in only or ROWS:
            if study.finished(name, seed) is None:
                task = f"{name}@{seed}"
                failed = run_again([*sys.argv[1:], "--worker", task], log=study.folder / "log.txt", jobs=1)
                console.print(f"{task}: {'failed, see log.txt' if failed else 'done'}", highlight=False)
    found = [raw for seed in range(seeds) for name in ROWS if (raw := study.finished(name, seed)) is not None]
    csv = docs / "results" / f"systems_{study.subject.name}.csv"
    write_csv(csv, [{"row": raw["row"], "seed": raw["seed"], **settings(study), **raw["figures"]} for raw in found])
    table_of(csv).show(console)
    (docs / "systems.md").write_text(page(docs))


def settings(study: Study) -> dict[str, int]:
    return {"iterations": study.iterations, "samples": study.samples, "seq_len": study.subject.seq_len}


def run_row(study: Study, name: str, seed: int) -> None:
    """In the row's own process."""
    from _judge import judge
    from upq.data import load_eval_text
    from upq.files.atomic import atomic_write
    from upq.model.loading import load_tokenizer
    from upq.run.quiet import quiet_libraries
    from upq.run.reporter import PlainLines
    from upq.run.run import quantize

    quiet_libraries()
    subject, work = study.subject, study.folder / "work" / f"{name}@{seed}"
    shutil.rmtree(work, ignore_errors=True)  # half a run has no whole time
    began = time.process_time()
    progress = PlainLines(Console(soft_wrap=True), every=60)
    manifest = quantize(subject.model, study.recipe(name, seed), work, device="cpu", progress=progress)
    spent = time.process_time() - began
    tokenizer = load_tokenizer(subject.model)
    heldout = {
        kind: load_eval_text(path, tokenizer, subject.seq_len)[:_HELDOUT_ROWS] for kind, path in study.heldout().items()
    }
    figures = judge(work, subject.model, heldout, None, device="cpu")
    figures.pop("items", None)
    figures |= {
        "bits": manifest.metrics["artifact"]["bits_per_weight"],
        "minutes": spent / 60,
        "peak": manifest.peak_memory_bytes,
        "ppl_original": manifest.metrics["source"]["ppl"],
    }
    found = {"row": name, "seed": seed, "key": study.key(name, seed), "figures": figures}
    atomic_write(study.file(name, seed), json.dumps(found, indent=1))
    shutil.rmtree(work, ignore_errors=True)


def table_of(csv: Path) -> Table:
    runs, rows = read_csv(csv), list[tuple[str, ...]]()
    for name, row in ROWS.items():
        own = [run for run in runs if run["row"] == name]
        if own:
            values = {key: [float(run[key]) for run in own] for key in ("bits", "kld", "ppl", "top1", "minutes")}
            rows.append(
                (
                    row.label,
                    f"{values['bits'][0]:.2f}",
                    spread(values["kld"], ".4f"),
                    spread(values["ppl"], ".3f"),
                    spread(values["top1"], ".3f"),
                    spread(values["minutes"], ".1f"),
                    row.claim,
                )
            )
    head = ("the block-wise stage", "bits", "KL", "perplexity", "top-1", "minutes of a processor", "published")
    return Table("Related systems", head, tuple(rows))


def page(docs: Path) -> str:
    parts = [_HEAD]
    for subject in SUBJECTS.values():
        csv = docs / "results" / f"systems_{subject.name}.csv"
        if csv.is_file():
            first = read_csv(csv)[0]
            parts += [
                f"## {subject.name}",
                f"{subject.about} {first['iterations']} steps of 4 rows a block, {first['samples']} calibration rows of"
                f" {first['seq_len']} tokens.",
                table_of(csv).markdown().rstrip(),
            ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    app()

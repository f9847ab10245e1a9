"""The paper in miniature: what each part is worth at equal token budgets. `python benchmarks/ablation.py`

Every row is a recipe (`_design.py`), run by the same pipeline as `upq quantize` in a process of its own and judged on
held-out text and on both suites. A finished row is a file and is not run again while its recipe and the model are what
they were; the same command goes on where it was stopped, also inside a row. `benchmarks/results.py` makes the page.
"""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import _corpora
import _findings
from _design import GROUPS, ORIGINAL, ROWS, Task, budgets, plan
from _rows import load_recipe, run_again
from _subjects import ROOT, SUBJECTS, Subject, named
from _table import Figure, make_console, show_figures, write_figures

if TYPE_CHECKING:
    from upq.run.recipe import Recipe

RUNS = ROOT / "runs" / "ablation"
TOKENS = 150_000
_HELDOUT_ROWS = 128
# What rows share of a run's work: a stage, and where it leaves what it made. The clock lies beside what is kept.


@dataclass(frozen=True)
class Study:
    """One subject, with everything that the rows have in common."""

    subject: Subject
    out: Path
    tokens: int
    split: str
    limit: int | None

    @property
    def label(self) -> str:
        parts = [
            self.subject.name,
            self.split if self.split != "test" else "",
            f"limit{self.limit}" if self.limit else "",
        ]
        return "-".join(part for part in parts if part)

    @property
    def folder(self) -> Path:
        return self.out / self.label

    @property
    def csv(self) -> Path:
        return self.out / f"{self.label}.csv"

    @cached_property
    def digest(self) -> str:
        from upq.files.digests import digest_model_dir

        return digest_model_dir(self.subject.model)

    def file(self, task: Task) -> Path:
        return self.folder / f"{task}.json"

    def corpus(self, kind: str) -> Path:
        if kind in self.subject.train:
            return self.subject.train[kind]
        whose = "" if _corpora.of_world(kind) else f"-{self.digest[:8]}"
        return self.out / "data" / f"{kind}-{self.longest}{whose}.jsonl"

    @property
    def heldout(self) -> dict[str, Path]:
        """Held-out texts by name; the first is the one that all tables show."""
        return dict(self.subject.heldout) or {"documents": self.corpus("heldout")}

    @property
    def longest(self) -> int:
        """Training tokens of the curves' last points, so that no row reads a text twice."""
        return max(budgets(self.tokens))

    def recipe(self, task: Task) -> Recipe:
        """What differs between rows comes last, so a row without training stays one at every budget."""
        from upq.data.config import TextSource

        row = ROWS[task.row]
        common = [f"seed={task.seed}", f"distill.tokens={task.tokens}", *self.subject.overrides]
        if "generate" in load_recipe(row.recipe, ()).stages:
            common.append(f"generate={self.subject.writes}")
        recipe = load_recipe(row.recipe, [*common, *row.overrides])
        sources = tuple(TextSource(path=str(self.corpus(kind))) for kind in row.data)
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": sources})})

    def plan(self, groups: tuple[str, ...], *, seeds: int, only: str = "") -> list[Task]:
        """Without rows about conversations that a model without a chat template cannot write."""
        tasks = plan(groups, seeds=seeds, tokens=self.tokens, only=only)
        if self.subject.writes != "null":
            return tasks
        overrides = {row: ROWS[row].overrides if row != ORIGINAL else () for row in {task.row for task in tasks}}
        return [task for task in tasks if not any(o.startswith("data.generated") for o in overrides[task.row])]

    def key(self, task: Task) -> str:
        """Identity of a run's result."""
        from upq.core.config import digest

        if task.row == ORIGINAL:
            return digest(self.digest, self.split, self.limit)
        return digest(self._identity(task), ROWS[task.row].data, self.digest, self.split, self.limit)

    def work(self, task: Task) -> Path:
        """Where rows keep their stages that read the same text. Budget and batch decide which rows calibrate."""
        from upq.core.config import digest

        recipe, identity = self.recipe(task), self._identity(task)
        distill, int2 = (recipe.stages[name].model_dump() for name in ("distill", "int2"))
        amount = (distill["tokens"], distill["batch_size"], int2["samples"])
        return self.out / "work" / digest(identity["data"], recipe.seed, *amount, ROWS[task.row].data, self.digest)

    def _identity(self, task: Task) -> dict[str, Any]:
        """The recipe without the places of files (which texts they are is said by the row).

        Without what is left at its default too: an option that comes later would make all old results new runs.
        """
        recipe = self.recipe(task)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": ()})})
        return recipe.model_dump(mode="json", exclude_defaults=True)

    def finished(self, task: Task) -> dict[str, Any] | None:
        file = self.file(task)
        if not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text())
        return found if found["key"] == self.key(task) else None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    subject: Annotated[str, typer.Option(help=f"One of: {', '.join(SUBJECTS)}.")] = "reference",
    model: Annotated[Path | None, typer.Option(help="Another model in the subject's place.")] = None,
    group: Annotated[list[str], typer.Option(help="Tables to run: " + ", ".join([*GROUPS, "curves"]))] = [],  # noqa: B006
    only: Annotated[str, typer.Option(help="Rows whose name this regular expression finds.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens of every row.")] = TOKENS,
    seeds: Annotated[int, typer.Option(min=1, help="Of the main table; all others have seed 0.")] = 3,
    split: Annotated[str, typer.Option(help="Items: test, or validation for tuning.")] = "test",
    limit: Annotated[int | None, typer.Option(min=2, help="Items of each task, to try the benchmark itself.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Rows at a time; the cores are shared out among them.")] = 1,
    out: Annotated[Path, typer.Option(help="Finished rows and the CSV files.")] = RUNS,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run what is missing, then print tables, claims and targets."""
    chosen = named(subject)
    chosen = chosen if model is None else replace(chosen, source=model)
    study = Study(chosen, out.resolve(), tokens, split, limit)
    if worker:
        run_worker(study, worker)
        return
    chosen.install()
    groups = tuple(group) or study.subject.groups
    if unknown := set(groups) - set(study.subject.groups):
        raise SystemExit(f"{subject} has no group {min(unknown)}; it has {', '.join(study.subject.groups)}")
    console = make_console()
    tasks = study.plan(groups, seeds=seeds, only=only)
    execute(study, tasks, jobs, console)
    _findings.save([_findings.as_run(raw) for raw in all_finished(study)], study.csv)
    results = _findings.load(study.csv, tokens)
    figures = report(results, groups, console)
    if json_file is not None:
        write_figures(figures, json_file)


def execute(study: Study, tasks: list[Task], jobs: int, console: Console) -> None:
    """Corpora first, one after the other, since several rows read the same one; then the rows."""
    todo = [task for task in tasks if study.finished(task) is None]
    heldout = () if study.subject.heldout else ("heldout",)
    kinds = dict.fromkeys(kind for task in todo for kind in (*heldout, *kinds_of(task)))
    corpora = [f"corpus@{kind}" for kind in kinds if not study.corpus(kind).is_file()]

    def run(name: str, jobs: int) -> tuple[str, bool]:
        return name, run_again([*sys.argv[1:], "--worker", name], log=study.folder / "log.txt", jobs=jobs)

    for name in corpora:
        tell(console, *run(name, 1))
    with ThreadPoolExecutor(jobs) as pool:
        for name, failed in pool.map(lambda task: run(str(task), jobs), todo):
            tell(console, name, failed)


def tell(console: Console, name: str, failed: bool) -> None:
    console.print(f"{name}: {'failed, see log.txt' if failed else 'done'}", highlight=False)


def kinds_of(task: Task) -> tuple[str, ...]:
    return () if task.row == ORIGINAL else ROWS[task.row].data


def all_finished(study: Study) -> list[dict[str, Any]]:
    """Every finished run of this subject, of other budgets too, whose recipe is still that of the row."""
    tasks = [Task.parse(file.stem) for file in sorted(study.folder.glob("*@*.json"))]
    found = [study.finished(task) for task in tasks if task.row in (ORIGINAL, *ROWS)]
    return [raw for raw in found if raw is not None]


def report(results: _findings.Results, groups: tuple[str, ...], console: Console) -> list[Figure]:
    tables = [_findings.table_of(results, GROUPS[name]) for name in groups if name != "curves"]
    if "curves" in groups:
        tables.append(_findings.curves(results))
    for table in tables:
        if table is not None:
            table.show(console)
    for verdict in _findings.verdicts(results):
        console.print(f"{verdict.claim.text}: {verdict.verdict}", highlight=False)
        for evidence in verdict.evidence:
            console.print(f"    {evidence}", highlight=False)
    figures = _findings.targets(results)
    show_figures(figures, console)
    return figures


# --- in the row's own process --------------------------------------------------------------------------------------


def run_worker(study: Study, name: str) -> None:
    import torch

    from upq.run.quiet import quiet_libraries

    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, rest = name.partition("@")
    if kind == "corpus":
        model = study.subject.model
        _corpora.write(rest, study.corpus(rest), tokens=study.longest, model=model, device=device)
    else:
        run_task(study, Task.parse(name), device)


def run_task(study: Study, task: Task, device: str) -> None:
    from _judge import Suites, judge
    from upq.data import load_eval_text
    from upq.files.atomic import atomic_write
    from upq.model.loading import load_tokenizer

    subject, key = study.subject, study.key(task)
    work = study.folder / "work" / key
    if task.row == ORIGINAL:
        model, figures = subject.model, size_of(subject.model)
    else:
        model, figures = work, quantise(study, task, work)
    tokenizer = load_tokenizer(subject.model)
    heldout = {
        name: load_eval_text(path, tokenizer, subject.seq_len)[:_HELDOUT_ROWS] for name, path in study.heldout.items()
    }
    suites = Suites(study.split, study.limit) if subject.suites else None
    figures |= judge(model, subject.model, heldout, suites, device=device)
    items = figures.pop("items", {})
    identity = {"row": task.row, "seed": task.seed, "tokens": task.tokens, "key": key}
    atomic_write(study.file(task), json.dumps({**identity, "figures": figures, "items": items}, indent=1))
    shutil.rmtree(work, ignore_errors=True)


def quantise(study: Study, task: Task, out: Path) -> dict[str, Any]:
    """Run the pipeline, with the INT4 blocks and the written conversations of a row that made the very same ones."""
    from upq.run.reporter import PlainLines
    from upq.run.run import quantize

    recipe = study.recipe(task)
    progress = PlainLines(Console(soft_wrap=True), every=60)
    manifest = quantize(study.subject.model, recipe, out, work=study.work(task), progress=progress)
    figures = manifest.metrics["artifact"]
    stages = {f"seconds_{stage}": spent for stage, spent in manifest.seconds.items()}
    size = {"bits": figures["bits_per_weight"], "bytes": figures["bytes"]}
    return size | stages | {"peak": manifest.peak_memory_bytes}


def size_of(model: Path) -> dict[str, Any]:
    from upq.artifact.size import model_size, weights_bytes
    from upq.model.loading import load_model

    return {"bits": model_size(load_model(model)).bits_per_weight, "bytes": weights_bytes(model)}


if __name__ == "__main__":
    app()

"""2-bit methods side by side on a real trained model of 260 thousand parameters: `python benchmarks/stories.py`.

Every row is a recipe, run by the same pipeline as `upq quantize`, in a process of its own (so that its peak memory is
its own), for several seeds. Finished rows are kept in the output directory; the same command again does the rest.

Needs a directory with models/stories260K and text/tinystories_{train,heldout}.txt (--data-dir).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from _rows import FROM_FP, NO_TRAINING, THROUGH_INT4, load_recipe, run_again
from _subjects import DATA, ROOT, Subject, named
from _table import Figure, Table, make_console, show_figures, spread, write_csv, write_figures

if TYPE_CHECKING:
    from upq.run.recipe import Recipe

SUBJECT = "stories260K"

# Row name: recipe and overrides. What is compared differs in these lines and in nothing else.
ROWS: dict[str, tuple[str, list[str]]] = {
    "INT4 nearest": ("paper", [FROM_FP, NO_TRAINING, "int2.bits=4"]),
    "INT4 block-wise": ("paper", [FROM_FP, NO_TRAINING, "int2.bits=4", "int2.method={paper.int4}"]),
    "INT2 nearest, asymmetric": ("paper", [FROM_FP, NO_TRAINING, "int2.grid=affine"]),
    "SEQ-2, Δ = max": ("paper", [FROM_FP, NO_TRAINING]),
    "SEQ-2, Δ = mse": ("paper", [FROM_FP, NO_TRAINING, "int2.method.scale=mse"]),
    "INT4 → SEQ-2, Δ = max": ("paper", [NO_TRAINING]),
    "SEQ-2 block-wise": ("default", [NO_TRAINING]),
    "INT4 → SEQ-2 block-wise": ("default", [THROUGH_INT4, NO_TRAINING]),
    "CE-QAT from FP": ("paper", [FROM_FP, "distill.loss=ce"]),
    "JSD-QAT from FP": ("paper", [FROM_FP]),
    "CE-QAT from INT4": ("paper", ["distill.loss=ce"]),
    "paper": ("paper", []),
    "default": ("default", []),
    "default through INT4": ("default", [THROUGH_INT4]),
}
# Rows that the seed can change, and those that the paper's claims and the targets rest on: they run for every seed.
SEEDED = ("QAT from FP", "paper", "default", "block-wise", "INT4 →")
ONCE = ("default through INT4", "INT4 → SEQ-2 block-wise")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    data_dir: Annotated[Path, typer.Option(help="Where the model and the texts lie.")] = DATA,
    out: Annotated[Path, typer.Option(help="Finished rows and the tables.")] = ROOT / "runs" / "stories",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Rows at a time; the cores are shared out among them.")] = 1,
    only: Annotated[str, typer.Option(help="Rows whose name contains this.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run what is missing, then print the table, the paper's claims and the targets."""
    if worker:
        run_worker(data_dir, out, worker)
        return
    named(SUBJECT, data_dir).install()
    out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in ROWS if only in name]
    todo = [f"{name}@{seed}" for seed in range(seeds) for name in wanted if seed == 0 or seeded(name)]
    todo = ["FP@0", *todo, "step@0", "wall@0"] if not only else todo
    console = make_console()
    with ThreadPoolExecutor(jobs) as pool:
        # The two timings come last and alone.
        parallel = [t for t in todo if not t.startswith(("step", "wall"))]
        for task, failed in pool.map(lambda t: (t, subrun(data_dir, out, t, jobs)), parallel):
            console.print(f"{task}: {'failed' if failed else 'done'}", highlight=False)
    for task in (t for t in todo if t.startswith(("step", "wall"))):
        subrun(data_dir, out, task, 1)
    report(out, seeds, console, json_file)


def seeded(name: str) -> bool:
    return name not in ONCE and any(part in name for part in SEEDED)


def file_of(out: Path, task: str) -> Path:
    """Named by the recipe too: a result of what the row was before is not taken for what it is now."""
    from upq.core.config import digest

    name, _, seed = task.rpartition("@")
    stem = task.replace(" ", "_").replace(",", "").replace("→", "to").replace("Δ_=_", "")
    return out / (f"{stem}.json" if name == "FP" else f"{stem}-{digest(recipe_of(name, int(seed)))}.json")


def recipe_of(name: str, seed: int) -> Recipe:
    """Of a row; the timings are of `default`."""
    base, overrides = ROWS["default" if name in ("step", "wall") else name]
    return load_recipe(base, [f"seed={seed}", "data.generated=null", *overrides])  # the model has no chat template


def subrun(data_dir: Path, out: Path, task: str, jobs: int) -> bool:
    """Run one row in a process of its own unless it is there; True if it failed."""
    if file_of(out, task).is_file():
        return False
    return run_again(["--data-dir", str(data_dir), "--out", str(out), "--worker", task], log=out / "log.txt", jobs=jobs)


# --- in the row's own process --------------------------------------------------------------------------------------


def run_worker(data_dir: Path, out: Path, task: str) -> None:
    import tempfile

    from upq.core.memory import peak_memory_bytes
    from upq.data import load_eval_text
    from upq.evals import evaluate_text
    from upq.files.atomic import atomic_write
    from upq.kernels import computing
    from upq.model.loading import load_model, load_tokenizer
    from upq.run.quiet import quiet_libraries

    quiet_libraries()
    name, _, seed = task.rpartition("@")
    subject = named(SUBJECT, data_dir)
    source, (heldout_file,) = subject.model, subject.heldout.values()
    result: dict[str, Any]
    if name == "step":
        result = step_times(subject)
    else:
        with tempfile.TemporaryDirectory() as folder:
            model, result = source, {"seconds": 0.0}
            if name != "FP":
                model = Path(folder) / "artifact"
                result = quantise(recipe_of(name, int(seed)), subject, model)
            heldout = load_eval_text(heldout_file, load_tokenizer(source), subject.seq_len)
            result["peak"] = result.get("peak") or peak_memory_bytes()
            with computing("reference"):  # the figures are of the weights
                metrics = evaluate_text(load_model(model), heldout, teacher=load_model(source))
            result |= {"ppl": metrics.ppl, "kld": metrics.kld, "top1": metrics.top1}
    atomic_write(file_of(out, task), json.dumps(result))


def quantise(recipe: Recipe, subject: Subject, out: Path) -> dict[str, Any]:
    from upq.data.config import TextSource
    from upq.run.reporter import PlainLines
    from upq.run.run import quantize

    train = TextSource(path=str(subject.train["documents"]))
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": (train,)})})
    began = time.monotonic()
    manifest = quantize(subject.model, recipe, out, progress=PlainLines(Console(soft_wrap=True), every=60))
    figures = manifest.metrics["artifact"]
    return {
        "seconds": time.monotonic() - began,
        "stages": manifest.seconds,
        "peak": manifest.peak_memory_bytes,
        "bits": figures["bits_per_weight"],
        "bytes": figures["bytes"],
    }


def step_times(subject: Subject) -> dict[str, Any]:
    """CPU seconds of a QAT step, of a plain fine-tuning step and of a teacher's forward pass, taken in turns."""
    import torch

    from upq.blockwise import Solution
    from upq.core.scheme import QuantScheme
    from upq.data import load_eval_text
    from upq.distill.objective import Objective
    from upq.distill.student import make_student
    from upq.grids import search_scale
    from upq.losses import LOSSES
    from upq.model.loading import load_model, load_tokenizer
    from upq.nn.blocks import model_weights
    from upq.run.recipe import Recipe
    from upq.stages.distill import Distill

    source = subject.model
    teacher = load_model(source).requires_grad_(False)
    plain = load_model(source).requires_grad_(True)
    distill = Recipe.load("default").stages["distill"]
    assert isinstance(distill, Distill)
    scheme = QuantScheme(bits=2)
    weights = {path: teacher.get_submodule(path).weight for path in model_weights(teacher)}
    start = {path: Solution(w, search_scale(w, scheme), scheme) for path, w in weights.items()}
    student = make_student(teacher, start, train_norms=distill.train_norms)
    loss = LOSSES.get(distill.loss.name)
    objective = Objective(
        student,
        teacher,
        loss(distill.loss.options(loss.Config, "loss")),
        chunk=distill.chunk_tokens,
        hidden=distill.hidden,
    )
    text = load_eval_text(subject.train["documents"], load_tokenizer(source), subject.seq_len)
    tokens = text[: distill.micro_batch_size]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    ours = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-6, fused=True)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-6, fused=True)

    def qat() -> None:
        objective(tokens, mask).backward()
        ours.step()
        ours.zero_grad()

    def qat_bf16() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(tokens, mask)
        loss.backward()
        ours.step()
        ours.zero_grad()

    def fine_tuning() -> None:
        plain(tokens, labels=tokens).loss.backward()
        theirs.step()
        theirs.zero_grad()

    def teacher_forward() -> None:
        with torch.no_grad():
            teacher(tokens)

    functions = (qat, qat_bf16, fine_tuning, teacher_forward)
    times: dict[str, list[float]] = {f.__name__: [] for f in functions}
    for f in functions * 23:
        times[f.__name__].append(clocked(f))
    medians = {name: statistics.median(values[3:]) for name, values in times.items()}
    return {**medians, "ratio": medians["qat"] / (medians["fine_tuning"] + medians["teacher_forward"])}


def clocked(f: Callable[[], None]) -> float:
    before = time.process_time()
    f()
    return time.process_time() - before


# --- the tables ----------------------------------------------------------------------------------------------------


def load_rows(out: Path, seeds: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for name in ["FP", *ROWS]:
        files = [file_of(out, f"{name}@{seed}") for seed in range(seeds)]
        found = [json.loads(file.read_text()) for file in files if file.is_file()]
        if found:
            yield name, found


def report(out: Path, seeds: int, console: Console, json_file: Path | None) -> None:
    rows = dict(load_rows(out, seeds))
    table = table_of(rows)
    table.show(console)
    (out / "table.md").write_text(table.markdown())
    write_csv(out / "stories.csv", [{"row": name} | numbers(run) for name, runs in rows.items() for run in runs])
    for claim in claims(rows):
        console.print(claim, highlight=False)
    figures = targets(rows, out)
    show_figures(figures, console)
    if json_file is not None:
        write_figures(figures, json_file)


def numbers(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if not isinstance(value, dict)}


def table_of(rows: dict[str, list[dict[str, Any]]]) -> Table:
    head = ("row", "bits a weight", "perplexity", "KL", "top-1", "seconds", "peak memory", "seeds")
    lines = tuple(
        (
            name,
            f"{found[0].get('bits', 32):.2f}",
            spread([f["ppl"] for f in found], ".2f"),
            spread([f["kld"] for f in found], ".4f"),
            spread([f["top1"] for f in found], ".1%"),
            f"{statistics.mean(f['seconds'] for f in found):.0f}",
            f"{max(f['peak'] for f in found) / 1e6:.0f} MB",
            str(len(found)),
        )
        for name, found in rows.items()
    )
    return Table("stories260K, held-out stories (mean ± standard deviation over seeds)", head, lines)


def claims(rows: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The paper's two claims, seed by seed."""
    for title, better, worse in (
        ("INT4 first beats FP16 → INT2 directly (KL)", "paper", "JSD-QAT from FP"),
        ("JSD beats next-token training, from FP (KL, top-1)", "JSD-QAT from FP", "CE-QAT from FP"),
        ("JSD beats next-token training, from INT4 (KL, top-1)", "paper", "CE-QAT from INT4"),
    ):
        for seed, (a, b) in enumerate(zip(rows.get(better, []), rows.get(worse, []), strict=False)):
            holds = a["kld"] < b["kld"] and ("top-1" not in title or a["top1"] > b["top1"])
            figures = f"KL {a['kld']:.4f} vs {b['kld']:.4f}, top-1 {a['top1']:.1%} vs {b['top1']:.1%}"
            yield f"seed {seed}: {title}: {'holds' if holds else 'does not hold'} ({figures})"


def targets(rows: dict[str, list[dict[str, Any]]], out: Path) -> list[Figure]:
    figures = []
    if "paper" in rows and "default" in rows:
        ratio = statistics.mean(r["kld"] for r in rows["default"]) / statistics.mean(r["kld"] for r in rows["paper"])
        figures.append(Figure("KL of default over KL of paper", ratio, "ratio", "<= 0.80", ratio <= 0.80))
    step, wall = file_of(out, "step@0"), file_of(out, "wall@0")
    if step.is_file():
        ratio = json.loads(step.read_text())["ratio"]
        name = "QAT step over fine-tuning step + teacher forward"
        figures.append(Figure(name, ratio, "ratio", "<= 1.6", ratio <= 1.6))
    if wall.is_file():
        minutes = json.loads(wall.read_text())["seconds"] / 60
        figures.append(Figure("upq quantize with default, all cores", minutes, "minutes", "<= 6", minutes <= 6))
    return figures


if __name__ == "__main__":
    app()

"""How fast a machine quantises: the INT4 stage, and QAT against plain fine-tuning: `python benchmarks/training.py`

Random Llamas of known shapes, no downloads. Each measurement runs in a process of its own, whose peak is its own: on a
GPU what its allocator has handed out, on the CPU the resident memory. QAT and fine-tuning take turns and are the same
loop (upq.distill.trainer.Training): precision, optimiser, batches, gradient checkpointing. Fine-tuning trains the
matrices that QAT trains, on the next token, with neither grid nor teacher. Timed are whole steps after a warm-up.

A few equal blocks are enough: a row with fewer blocks is extrapolated, and its name shows it.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from _alone import run_alone
from _table import Figure, Table, make_console, show_figures, write_figures

SHAPES = {  # hidden size, MLP, blocks, heads, heads of keys and values, vocabulary, tied
    "1b": (2048, 8192, 16, 32, 8, 128_256, True),  # Llama 3.2
    "8b": (4096, 14_336, 32, 32, 8, 128_256, False),  # Llama 3.1
    "small": (512, 2048, 8, 8, 2, 4096, True),
    "tiny": (64, 128, 4, 4, 2, 512, True),
}
STAGES = ("int4", "qat", "finetune")
RATIO = 0.65  # of fine-tuning's tokens a second; a teacher's pass beside three of the student leaves 0.75 at most
WARMUP = 2  # steps: the moments come with the first

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Job:
    """One measurement. `overrides` are the recipe's of the training, `iterations` those of the INT4 stage."""

    stage: str
    shape: str
    blocks: int
    device: str
    recipe: str
    overrides: tuple[str, ...]
    samples: int
    iterations: int
    seq_len: int
    steps: int
    work: str = ""


@app.command()
def main(
    shape: Annotated[list[str], typer.Option(help=f"{', '.join(SHAPES)}; repeatable.")] = ["1b", "8b"],  # noqa: B006
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    stage: Annotated[list[str], typer.Option(help=f"{', '.join(STAGES)}; repeatable.")] = [*STAGES],  # noqa: B006
    blocks: Annotated[int, typer.Option(min=2, help="To run at the most, the rest extrapolated.")] = 4,
    recipe: Annotated[str, typer.Option(help="Of the training; the INT4 stage is that of `paper`.")] = "default",
    set_: Annotated[list[str], typer.Option("--set", help="Of that recipe; repeatable.")] = [],  # noqa: B006
    batch: Annotated[int, typer.Option(min=1, help="Rows of a training step.")] = 8,
    micro_batch: Annotated[int, typer.Option(min=1, help="Rows of a forward pass.")] = 2,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing, in both trainings.")] = False,
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens of a row.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows of the INT4 stage.")] = 128,
    iterations: Annotated[int, typer.Option(min=1, help="Of the INT4 stage, for each block.")] = 400,
    steps: Annotated[int, typer.Option(min=1, help="Timed in each process.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Processes for each training, in turns.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where files go for the time being.")] = None,
) -> None:
    for given, known, option in ((shape, SHAPES, "--shape"), (stage, STAGES, "--stage")):
        if unknown := [name for name in given if name not in known]:
            raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}", param_hint=option)
    if any(setting.startswith("distill.teacher=") for setting in set_):
        raise typer.BadParameter("the teacher is resident here; leave distill.teacher out", param_hint="--set")
    target, machine = chosen(device)
    settings = (
        f"distill.batch_size={batch}",
        f"distill.micro_batch_size={micro_batch}",
        f"distill.gradient_checkpointing={str(checkpointing).lower()}",
        *set_,
    )
    console, rows, figures = make_console(), list[tuple[str, ...]](), list[Figure]()
    for name in shape:
        all_blocks = SHAPES[name][2]
        ran = min(blocks, all_blocks)
        job = Job("", name, ran, target, recipe, settings, samples, iterations, seq_len, steps)
        marked = "" if job.blocks == all_blocks else f", extrapolated from {job.blocks} of {all_blocks} blocks"
        if "int4" in stage:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                found = run_alone(__file__, json.dumps(asdict(replace(job, stage="int4", work=folder))))
            if shown := row(rows, f"{name}, int4{marked}", found):
                size = f"{samples} x {seq_len} tokens, {iterations} iterations"
                figures.append(free(f"{name}: INT4 stage, {size}{marked}", shown[0] / 60, "min"))
                figures.append(free(f"{name}: memory of the INT4 stage", shown[1] / 1e9, "GB"))
        trained = train(job, [kind for kind in ("qat", "finetune") if kind in stage], repeats)
        speed = {}
        for kind, found in trained.items():
            if shown := row(rows, f"{name}, {kind}{marked}", found):
                speed[kind] = batch * seq_len / shown[0]
                figures.append(free(f"{name}: {kind}{marked}", speed[kind], "tokens/s"))
                figures.append(free(f"{name}: memory of {kind}{marked}", shown[1] / 1e9, "GB"))
        if len(speed) == 2:
            ratio = speed["qat"] / speed["finetune"]
            about = f"{name}: tokens/s of QAT over fine-tuning{marked}"
            figures.append(Figure(about, ratio, "", f">= {RATIO}", ratio >= RATIO))
    title = f"{machine}; {batch} rows a step, {micro_batch} a pass, {seq_len} tokens; {repeats} x {steps} steps"
    Table(title, ("what", "seconds, of the stage or a step", "peak, GB"), tuple(rows)).show(console)
    show_figures(figures, console)
    if json_file is not None:
        write_figures(figures, json_file)
    raise typer.Exit(not all(figure.ok for figure in figures))


def chosen(device: str) -> tuple[str, str]:
    """The device, and what it is called."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is none of auto, cpu, cuda", param_hint="--device")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        typer.echo(f"--device cuda: torch {torch.__version__} sees no CUDA device; use --device cpu", err=True)
        raise typer.Exit(2)
    if device == "cpu" or not there:
        return "cpu", f"CPU, {torch.get_num_threads()} threads"
    return "cuda", torch.cuda.get_device_name()


def free(name: str, value: float, unit: str) -> Figure:
    """A figure that no target was set for."""
    return Figure(name, value, unit, "none", True)


def row(rows: list[tuple[str, ...]], name: str, found: dict[str, Any]) -> tuple[float, float] | None:
    """Put the measurement into the table; None where it did not fit into memory."""
    if "error" in found:
        rows.append((name, found["error"], "–"))
        return None
    rows.append((name, f"{found['seconds']:,.3g}", f"{found['peak'] / 1e9:,.2f}"))
    return found["seconds"], found["peak"]


def train(job: Job, kinds: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of a step and peak of each kind, of the whole depth. They take turns: a slow minute is everyone's."""
    all_blocks = SHAPES[job.shape][2]
    depths = [job.blocks] if job.blocks == all_blocks else [job.blocks // 2, job.blocks]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {(kind, depth): [] for kind in kinds for depth in depths}
    for _ in range(repeats):
        for (kind, depth), runs in found.items():
            runs.append(run_alone(__file__, json.dumps(asdict(replace(job, stage=kind, blocks=depth)))))
    return {kind: at_depth({depth: found[kind, depth] for depth in depths}, all_blocks) for kind in kinds}


def at_depth(runs: dict[int, list[dict[str, Any]]], blocks: int) -> dict[str, Any]:
    """Along the line through the two depths that were run, or the only one."""
    points = []
    for depth, found in runs.items():
        if errors := [each for each in found if "error" in each]:
            return errors[0]
        seconds = statistics.median(second for each in found for second in each["seconds"])
        points.append((depth, seconds, max(each["peak"] for each in found)))
    (low, *first), (high, *last) = points[0], points[-1]
    further = (blocks - high) / max(1, high - low)
    # No block takes less than nothing: that would be noise.
    seconds, peak = (b + max(0.0, b - a) * further for a, b in zip(first, last, strict=True))
    return {"seconds": seconds, "peak": peak}


# ---- in a process of its own


def measure(job: Job) -> dict[str, Any]:
    import torch

    from upq.core.memory import peak_memory_bytes
    from upq.run.quiet import quiet_libraries

    quiet_libraries()
    torch.manual_seed(0)
    try:
        seconds = solve(job) if job.stage == "int4" else steps_of(job)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    peak = torch.cuda.max_memory_allocated() if job.device == "cuda" else peak_memory_bytes()
    return {"seconds": seconds, "peak": peak}


def config_of(job: Job) -> Any:
    from transformers import AutoConfig

    hidden, mlp, _, heads, groups, vocabulary, tied = SHAPES[job.shape]
    return AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=job.blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        max_position_embeddings=131_072,
        tie_word_embeddings=tied,
    )


def solve(job: Job) -> float:
    """Seconds of the INT4 stage of the whole model: those of a block, the first one's embedding included, for each."""
    import torch
    from transformers import AutoModelForCausalLM

    from upq.blockwise import METHODS, BlockStore, walk
    from upq.core.progress import Silent
    from upq.model.source import Source
    from upq.run.recipe import Recipe
    from upq.stages.blockwise import Blockwise

    folder, auto = Path(job.work), AutoModelForCausalLM
    auto.from_config(config_of(job), dtype=torch.bfloat16).save_pretrained(folder / "model")  # type: ignore[no-untyped-call]
    stage = Recipe.load("paper", [f"int4.method.iterations={job.iterations}"]).stages["int4"]
    assert isinstance(stage, Blockwise)
    cls = METHODS.get(stage.method.name)
    began = time.monotonic()
    walk(
        Source(folder / "model", device=job.device),
        torch.randint(SHAPES[job.shape][5], (job.samples, job.seq_len)),
        cls(stage.method.options(cls.Config, "method")),
        BlockStore(folder / "int4", stage.scheme(), latents=False),
        given=None,
        seed=0,
        progress=Silent(),
        precision="auto",
    )
    return (time.monotonic() - began) / job.blocks * SHAPES[job.shape][2]


def steps_of(job: Job) -> list[float]:
    """Seconds of each step of a training."""
    import torch

    from upq.core.config import Plugin
    from upq.core.signals import Stop
    from upq.distill.trainer import Training
    from upq.run.recipe import Recipe
    from upq.stages.distill import Distill

    recipe = Recipe.load(job.recipe, [*job.overrides, f"data.seq_len={job.seq_len}"])
    distill = recipe.stages["distill"]
    assert isinstance(distill, Distill)
    if job.stage == "qat":
        student, teacher = with_grid(job, recipe)
    else:
        student = teacher = plain(job)
        distill = distill.model_copy(update={"loss": Plugin(name="ce"), "hidden": 0.0, "train_norms": False})
    training = Training(student, teacher, Rows(SHAPES[job.shape][5], job.seq_len), distill)
    del student, teacher
    seconds = []
    for step in range(WARMUP + job.steps):
        began = time.monotonic()
        training.step(step, 1.0, Stop())
        if job.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    return seconds[WARMUP:]


@dataclass(frozen=True)
class Rows:
    """Random tokens, all of them targets."""

    vocabulary: int
    seq_len: int

    def batch(self, step: int, size: int) -> Any:
        import torch

        generator = torch.Generator().manual_seed(step)
        tokens_BT = torch.randint(self.vocabulary, (size, self.seq_len), generator=generator)
        return tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool)

    def rows(self, step: int, size: int) -> Any:
        import torch

        return torch.arange(step * size, (step + 1) * size)


def model_of(job: Job) -> Any:
    """In float32, as the training loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(job.device):
        model: Any = AutoModelForCausalLM.from_config(config_of(job), dtype=torch.float32)
    return model.eval().requires_grad_(False)


def with_grid(job: Job, recipe: Any) -> tuple[Any, Any]:
    """Student and teacher."""
    from upq.distill.student import make_student
    from upq.grids import GRIDS
    from upq.nn.blocks import model_weights
    from upq.nn.fake_quant import Solution

    teacher, scheme, solutions = model_of(job), recipe.stages["int2"].scheme(), {}
    for path in model_weights(teacher):
        weight_OI = teacher.get_submodule(path).weight
        solutions[path] = Solution(weight_OI, GRIDS.get(scheme.grid).init(weight_OI, scheme), scheme)
    return make_student(teacher, solutions, train_norms=recipe.stages["distill"].train_norms), teacher


def plain(job: Job) -> Any:
    """The same matrices, trained as they are."""
    from torch import Tensor
    from torch.nn import functional as F

    from upq.core.scheme import QuantScheme
    from upq.nn.blocks import model_weights
    from upq.nn.fake_quant import FakeQuantLinear

    class Plain(FakeQuantLinear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    model = model_of(job)
    for path in model_weights(model):
        linear = model.get_submodule(path)
        model.set_submodule(path, Plain(linear.weight, {}, QuantScheme(bits=2), linear.bias))
    return model


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        raw = json.loads(sys.argv[1])
        print(json.dumps(measure(Job(**raw | {"overrides": tuple(raw["overrides"])}))))
    else:
        app()

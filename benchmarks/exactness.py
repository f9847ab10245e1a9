"""What every export format holds, and what its engine computes from it: `python benchmarks/exactness.py`

Weights are read back through the engine's own reader, as `upq export` always does; logits come from the engine itself
and are compared with the packed model's, computed in the same type. Engines that are not installed leave their columns
empty; `make test-engines` makes an environment (.venv-engines) that has all that run on a CPU.

The real models are trained first, shortly, and kept in --out: what an engine's rounding of inputs costs is a question
about models that people have, and the nearest levels would multiply it. The tiny one is random.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import _engines
from _table import Figure, Table, make_console, show_figures, write_figures

if TYPE_CHECKING:
    from torch import Tensor

    from upq.exports import Report

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
STORIES = DATA / "models" / "stories260K"
TOKENS = 64
TEXTS = 8
# KL in nats. Arithmetic in another order, the same where a model computes in 16 bits, and what inputs rounded to 8 bits
# may cost.
ORDER, HALF, ROUNDED = 1e-6, 1e-5, 1e-3


@dataclass(frozen=True, slots=True)
class Row:
    """A format with its options, on the grid that it is for."""

    name: str
    form: str
    options: dict[str, Any] = field(default_factory=dict)
    grid: str = "seq"
    kl: float = ORDER


ROWS = (
    Row("gguf", "gguf", kl=ROUNDED),
    Row("compressed-tensors, 4 bits", "compressed-tensors"),
    Row("compressed-tensors, 3 bits", "compressed-tensors", {"bits": 3}),
    Row("onnx", "onnx"),
    Row("onnx, int8 activations", "onnx", {"activations": "int8"}, kl=ROUNDED),
    Row("openvino", "openvino"),
    Row("mlx", "mlx", kl=HALF),
    Row("mnn", "mnn", {"activations": "float"}),
    Row("mnn, int8 activations", "mnn", kl=ROUNDED),
    Row("executorch", "executorch", {"activations": "float"}),
    Row("executorch, int8 activations", "executorch", kl=ROUNDED),
    Row("litert", "litert", {"activations": "float", "bundle": False}),
    Row("litert, int8 activations", "litert", {"bundle": False}, kl=ROUNDED),
    Row("torchao", "torchao"),
    Row("dense, float32", "dense", {"dtype": "fp32"}),
    Row("dense, as the model", "dense"),
    Row("humming", "humming"),
    Row("gptq, 4 bits", "gptq"),
    Row("int2: compressed-tensors", "compressed-tensors", grid="sym"),
    Row("int2: gptq", "gptq", grid="sym"),
    Row("q2_0: gguf, TQ2_0", "gguf", {"tq2_0": True}, grid="q2_0", kl=ROUNDED),
)


@dataclass(frozen=True)
class Subject:
    """A model in 2 bits, and texts that it was not trained on."""

    name: str
    folder: Path

    def artifact(self, grid: str) -> Path:
        made = self.folder / self.name.replace(" ", "-") / grid
        if not (made / "upq.json").exists():
            self._make(made, grid)
        return made

    def _make(self, made: Path, grid: str) -> None:
        from tiny import tiny_artifact
        from upq.core.scheme import QuantScheme
        from upq.run.recipe import Recipe
        from upq.run.run import quantize
        from upq.world.reference import REFERENCE

        if self.name == "tiny qwen3":  # widths that no block size divides
            odd = {"hidden_size": 72, "head_dim": 20, "intermediate_size": 172}
            tiny_artifact(made, "qwen3", scheme=QuantScheme(bits=2, grid=grid), **odd)
            return
        model, recipe = {"reference": (REFERENCE, "demo"), "stories260K": (STORIES, "default")}[self.name]
        few = [f"data.sources=[{{path: {self._text('train')}}}]", "data.generated=null", "distill.tokens=60_000"]
        quantize(model, Recipe.load(recipe, [*few, f"int2.grid={grid}"]), made, device="cpu")

    def _text(self, part: str) -> Path:
        if self.name == "stories260K":
            return DATA / "text" / f"tinystories_{part}.txt"
        from upq.world import World
        from upq.world.corpus import write_corpus

        file = self.folder / f"world-{part}.jsonl"
        if not file.exists():
            n, seed = {"train": (3000, 1), "heldout": (TEXTS, 2)}[part]
            write_corpus(file, World(), n=n, seed=seed)
        return file

    @cached_property
    def texts(self) -> list[list[int]]:
        from upq.model.loading import load_tokenizer

        tokenizer = load_tokenizer(self.artifact("seq"))
        if self.name == "stories260K":
            texts = self._text("heldout").read_text()[:20_000].split("\n\n")
        else:
            texts = [json.loads(line)["text"] for line in self._text("heldout").read_text().splitlines()]
        return [tokenizer(text.strip()).input_ids[:TOKENS] for text in texts[:TEXTS]]


SUBJECTS = ("tiny qwen3", "stories260K", "reference")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row on one subject; what the engine computed is None where it did not run."""

    subject: str
    row: Row
    report: Report | None  # None: refused
    seconds: float = 0.0
    refusal: str = ""
    logit_error: float | None = None
    kl: float | None = None
    engine: dict[str, str] = field(default_factory=dict)

    @property
    def weight_error(self) -> float:
        assert self.report is not None
        return max(carried.max_error for carried in self.report.carriers)


def main(
    only: Annotated[str, typer.Option(help="Rows whose name contains this.")] = "",
    subject: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SUBJECTS)}; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="Where the models are kept.")] = ROOT / "runs" / "exactness",
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    sys.path.insert(0, str(ROOT / "tests"))  # the makers of small artefacts
    from upq.run.quiet import quiet_libraries

    quiet_libraries()
    console = make_console()
    figures: list[Figure] = []
    for name in subject or SUBJECTS:
        if name == "stories260K" and not STORIES.is_dir():
            console.print(f"{name}: {STORIES} is not here; left out")
            continue
        with tempfile.TemporaryDirectory() as folder:
            model = Subject(name, out.resolve())
            outcomes = [_measure(model, row, Path(folder)) for row in ROWS if only in row.name]
        _table(name, outcomes).show(console)
        for outcome in outcomes:
            if outcome.report is None:
                console.print(f"{outcome.row.name}: {outcome.refusal}", soft_wrap=True, highlight=False, markup=False)
            figures += _figures(outcome)
    show_figures([figure for figure in figures if not figure.ok], console)
    console.print(f"{sum(figure.ok for figure in figures)} of {len(figures)} targets met")
    if json_file is not None:
        write_figures(figures, json_file)
    raise typer.Exit(not all(figure.ok for figure in figures))


def _measure(subject: Subject, row: Row, folder: Path) -> Outcome:
    from upq.core.errors import UPQError
    from upq.exports import EXPORTS, export

    artifact = subject.artifact(row.grid)
    suffix = EXPORTS.get(row.form.replace("-", "_")).suffix or ""
    out = folder / "exports" / f"{ROWS.index(row)}{suffix}"
    begun = time.monotonic()
    try:
        report = export(artifact, row.form, out, options=row.options)
    except UPQError as error:
        return Outcome(subject.name, row, None, refusal=str(error))
    seconds = time.monotonic() - begun
    run = _engines.run(row.form, out, subject.texts)
    if run is None:
        return Outcome(subject.name, row, report, seconds)
    packed = _packed(artifact, subject.texts, run.dtype)
    pairs = list(zip(packed, run.logits_TV, strict=True))
    apart = max((engine_TV - packed_TV).abs().max().item() for packed_TV, engine_TV in pairs)
    kl = sum(_kl(*pair) for pair in pairs) / sum(map(len, subject.texts))
    versions = _engines.versions(row.form)
    return Outcome(subject.name, row, report, seconds, logit_error=apart, kl=kl, engine=versions)


def _packed(artifact: Path, texts: list[list[int]], dtype: Any) -> list[Tensor]:
    import torch

    import upq
    from upq.kernels import computing

    model: Any = upq.load(artifact, dtype=dtype)
    with computing("reference"), torch.inference_mode():  # what the weights say, without int8 activations
        return [model(torch.tensor([ids])).logits[0].float() for ids in texts]


def _kl(packed_TV: Tensor, engine_TV: Tensor) -> float:
    """KL(packed ‖ engine), nats, summed over the tokens."""
    p_TV, q_TV = (logits.double().log_softmax(-1) for logits in (packed_TV, engine_TV))
    return (p_TV.exp() * (p_TV - q_TV)).sum().item()


def _figures(outcome: Outcome) -> Iterator[Figure]:
    about = f"{outcome.subject}, {outcome.row.name}"
    if outcome.report is None:
        # refusing what is not exact is right, and a missing package no failure; failing the own check is one
        if "cannot hold" not in outcome.refusal and "is not installed" not in outcome.refusal:
            yield Figure(f"{about}: exported", 0.0, "", "yes", ok=False)
        return
    yield Figure(f"{about}: largest weight error", outcome.weight_error, "", "0", outcome.weight_error == 0)
    if outcome.kl is not None:
        most = outcome.row.kl
        yield Figure(f"{about}: KL to the packed model", outcome.kl, "nats", f"< {most:g}", outcome.kl < most)


def _table(subject: str, outcomes: Iterable[Outcome]) -> Table:
    head = ("format", "bytes", "bits a weight", "weight error", "logit error", "KL, nats", "seconds", "engine")
    return Table(subject, head, tuple(_cells(outcome) for outcome in outcomes if outcome.report is not None))


def _cells(outcome: Outcome) -> tuple[str, ...]:
    report = outcome.report
    assert report is not None
    computed = ["not run", ""] if outcome.kl is None else [f"{outcome.logit_error:.1e}", f"{max(outcome.kl, 0):.1e}"]
    return (
        outcome.row.name,
        f"{report.bytes:,}",
        f"{report.bits_per_weight:.3f}",
        f"{outcome.weight_error:.1e}" if outcome.weight_error else "0",
        *computed,
        f"{outcome.seconds:.1f}",
        ", ".join(f"{package} {version}" for package, version in {**report.engine, **outcome.engine}.items()),
    )


if __name__ == "__main__":
    typer.run(main)

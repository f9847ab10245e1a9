"""What every export format holds, and what its engine computes from it: `python benchmarks/exactness.py`

Weights are read back through the engine's own reader, as `upq export` always does; logits come from the engine itself
and are compared with the packed model's, computed in the same type. Engines that are not installed leave their columns
empty; `make test-engines` makes an environment (.venv-engines) that has all that run on a CPU.
"""

from __future__ import annotations

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
STORIES = ROOT.parent / "shared" / "data" / "models" / "stories260K"
TOKENS = 64
TEXT = "Once upon a time there was a little girl. Who lives in the north? Tell me three words about a river. " * 4
# KL in nats. Arithmetic in another order, and what inputs rounded to 8 bits may cost.
ORDER, ROUNDED = 1e-6, 1e-3


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
    Row("mlx", "mlx"),
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
    """A model in 2 bits, its weights rounded to the nearest level: what training would change is not looked at here."""

    name: str
    folder: Path

    def artifact(self, grid: str) -> Path:
        from tiny import artifact_of, tiny_artifact
        from upq.demo import REFERENCE
        from upq.scheme import QuantScheme

        made, scheme = self.folder / grid, QuantScheme(bits=2, grid=grid)
        if made.exists():
            return made
        if self.name == "tiny qwen3":  # widths that no block size divides
            odd = {"hidden_size": 72, "head_dim": 20, "intermediate_size": 172}
            return tiny_artifact(made, "qwen3", scheme=scheme, **odd)
        return artifact_of(made, {"reference": REFERENCE, "stories260K": STORIES}[self.name], scheme=scheme)

    @cached_property
    def ids(self) -> list[int]:
        from upq.loading import load_tokenizer

        ids: list[int] = load_tokenizer(self.artifact("seq"))(TEXT).input_ids[:TOKENS]
        return ids


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
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    sys.path.insert(0, str(ROOT / "tests"))  # the makers of small artefacts
    from upq.quiet import quiet_libraries

    quiet_libraries()
    console = make_console()
    figures: list[Figure] = []
    for name in subject or SUBJECTS:
        if name == "stories260K" and not STORIES.is_dir():
            console.print(f"{name}: {STORIES} is not here; left out")
            continue
        with tempfile.TemporaryDirectory() as folder:
            model = Subject(name, Path(folder))
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
    from upq.errors import UPQError
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
    run = _engines.run(row.form, out, subject.ids)
    if run is None:
        return Outcome(subject.name, row, report, seconds)
    packed_TV = _packed(artifact, subject.ids, run.dtype)
    apart = (run.logits_TV - packed_TV).abs().max().item()
    kl, versions = _kl(packed_TV, run.logits_TV), _engines.versions(row.form)
    return Outcome(subject.name, row, report, seconds, logit_error=apart, kl=kl, engine=versions)


def _packed(artifact: Path, ids: list[int], dtype: Any) -> Tensor:
    import torch

    import upq
    from upq.kernels import computing

    model: Any = upq.load(artifact, dtype=dtype)
    with computing("reference"), torch.inference_mode():  # what the weights say, without int8 activations
        logits: Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


def _kl(packed_TV: Tensor, engine_TV: Tensor) -> float:
    """KL(packed ‖ engine), nats a token."""
    p_TV, q_TV = (logits.double().log_softmax(-1) for logits in (packed_TV, engine_TV))
    return (p_TV.exp() * (p_TV - q_TV)).sum(-1).mean().item()


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

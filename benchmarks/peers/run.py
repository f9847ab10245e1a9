"""UPQ beside its peers, the same model, text and judges for all: `python benchmarks/peers/run.py` (see README.md here).

Every row is quantised in a process of its own, a peer's in the peer's own environment, and then judged here. Finished
rows are kept in the output directory; the same command again does the rest. A row whose folder is deleted runs again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from environment import HERE, NotInstallable, python_of
from rich.console import Console

sys.path.insert(0, str(HERE.parent))
from _subjects import DATA, ROOT, SUBJECTS, Subject, named

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZES = (-1, 64, 32)


@dataclass(frozen=True)
class Trial:
    """A subject and its texts, all on disk."""

    subject: Subject
    train: Path  # calibration, and UPQ's training
    heldout: dict[str, Path]


@dataclass(frozen=True)
class Row:
    label: str
    peer: str  # with_<peer>.py, requirements-<peer>.txt
    variant: str = ""
    group_size: int = -1

    @property
    def name(self) -> str:
        return self.label + ("" if self.group_size == -1 else f", group {self.group_size}")

    @property
    def folder(self) -> str:
        return f"{self.peer}@{self.variant}@{'row' if self.group_size == -1 else self.group_size}"


def grouped(label: str, peer: str, variant: str = "") -> list[Row]:
    return [Row(label, peer, variant, size) for size in GROUP_SIZES]


ROWS = [
    Row("original", "upq", "original"),
    Row("nearest rounding", "upq", "nearest"),
    *grouped("torchao", "torchao", "affine"),
    *grouped("torchao, HQQ scales", "torchao", "hqq_scale_only"),
    *grouped("HQQ, axis 1", "hqq", "axis=1"),
    *grouped("HQQ, axis 0", "hqq", "axis=0"),
    *grouped("llm-compressor GPTQ", "llmcompressor", "symmetric"),
    *grouped("llm-compressor GPTQ, asymmetric", "llmcompressor", "asymmetric"),
    *grouped("GPTQModel", "gptqmodel", "symmetric"),
    *grouped("GPTQModel, asymmetric", "gptqmodel", "asymmetric"),
    *grouped("AutoRound best", "autoround"),
    Row("UPQ `paper`", "upq", "paper"),
    *grouped("UPQ `default`", "upq", "default"),
]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    subject: Annotated[str, typer.Option(help=f"One of {', '.join(SUBJECTS)}, or a name for --model.")] = "stories260K",
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory of another subject.")] = None,
    train: Annotated[Path | None, typer.Option(help="Its calibration text.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Its evaluation text.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a row of text for --model.")] = 512,
    data_dir: Annotated[Path, typer.Option(help="Where the subjects' files lie.")] = DATA,
    out: Annotated[Path, typer.Option(help="Environments, finished rows and tables.")] = ROOT / "runs" / "peers",
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name contains this; may be repeated.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    """Build what environments are missing, run what rows are missing, print the table."""
    from table import report

    folder = out.resolve() / subject
    trial = find_trial(subject, model, train, heldout, seq_len, data_dir.resolve(), folder)
    console = Console(width=160) if not Console().is_terminal else Console()
    folder.mkdir(parents=True, exist_ok=True)
    heldout_rows: dict[str, Tensor] = {}
    for row in (row for row in ROWS if any(part.lower() in row.name.lower() for part in only or [""])):
        made = make(row, trial, folder / row.folder, out.resolve() / "env")
        if made["error"] is None and not (folder / row.folder / "judged.json").is_file():
            heldout_rows = heldout_rows or rows(trial)
            judge_row(folder / row.folder, trial.subject, heldout_rows)
        console.print(f"{row.name}: {made['error'] or 'done'}", highlight=False, markup=False)
    report(list(finished(folder)), subject, folder, console, json_file)


def find_trial(
    name: str, model: Path | None, train: Path | None, heldout: Path | None, seq_len: int, data_dir: Path, folder: Path
) -> Trial:
    if model is None:
        subject = named(name, data_dir)
    elif train is None or heldout is None:
        raise SystemExit("--model needs --train and --heldout")
    elif name in SUBJECTS:
        raise SystemExit(f"--model needs a --subject of its own; {name!r} is taken")
    else:
        subject = Subject(
            name, "", model.resolve(), (), train={"documents": train.resolve()}, heldout={"text": heldout.resolve()},
            seq_len=seq_len, suites=True,
        )  # fmt: skip
    subject.install()
    return Trial(subject, *subject.texts(folder, tokens=subject.budget or 0))


def make(row: Row, trial: Trial, folder: Path, environments: Path) -> dict[str, Any]:
    """What `peer.Made` says of this row; the adapter runs unless it has run before."""
    file = folder / "made.json"
    if not file.is_file():
        shutil.rmtree(folder, ignore_errors=True)  # half a row says nothing of time and memory
        folder.mkdir(parents=True)
        try:
            run_adapter(row, trial, folder, python_of(row.peer, environments))
        except NotInstallable as error:
            file.write_text(json.dumps({"version": row.peer, "error": f"not installable: {error}"}))
    made: dict[str, Any] = json.loads(file.read_text())
    return made


def run_adapter(row: Row, trial: Trial, folder: Path, python: Path) -> None:
    subject = trial.subject
    job = {
        "model": str(subject.model),
        "text": str(trial.train),
        "tokens": str(calibration(trial, folder.parent)),
        "seq_len": subject.seq_len,
        "group_size": row.group_size,
        "variant": row.variant,
        "budget": subject.budget,
    }
    (folder / "job.json").write_text(json.dumps(job))
    with (folder / "log.txt").open("w") as log:
        command = [python, HERE / f"with_{row.peer}.py", folder]
        done = subprocess.run(command, cwd=folder, stdout=log, stderr=log, check=False)
    if done.returncode > 0 and not (folder / "made.json").is_file():  # before its first line: the import failed
        last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
        (folder / "made.json").write_text(json.dumps({"version": row.peer, "error": "".join(last)[:400]}))
    if done.returncode < 0:
        raise SystemExit(f"{row.name}: killed by signal {-done.returncode}; the same command again repeats this row")


def calibration(trial: Trial, folder: Path) -> Path:
    from judge import rows_of
    from safetensors.torch import save_file

    file = folder / "calibration.safetensors"
    if not file.is_file():
        save_file({"tokens_NT": rows_of(trial.train, trial.subject)}, file)
    return file


def rows(trial: Trial) -> dict[str, Tensor]:
    from judge import rows_of

    return {name: rows_of(text, trial.subject) for name, text in trial.heldout.items()}


def judge_row(folder: Path, subject: Subject, heldout: dict[str, Tensor]) -> None:
    from judge import judge

    from upq.core.errors import UPQError

    try:
        judged = asdict(judge(folder / "dense", subject, heldout))
    except UPQError as error:  # a model that computes NaN
        judged = {"error": str(error)}
    (folder / "judged.json").write_text(json.dumps(judged))


def finished(folder: Path) -> Iterator[tuple[Row, dict[str, Any]]]:
    for row in ROWS:
        files = [folder / row.folder / name for name in ("made.json", "judged.json")]
        if files[0].is_file():
            yield row, {key: value for f in files if f.is_file() for key, value in json.loads(f.read_text()).items()}


if __name__ == "__main__":
    app()

"""UPQ beside its peers, the same model, text and judges for all: `python benchmarks/peers/run.py` (see README.md here).

Every row is quantised in a process of its own, a peer's in the peer's own environment, and then judged here. Finished
rows are kept in the output directory; the same command again does the rest. A row whose folder is deleted runs again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from environment import HERE, NotInstallable, python_of
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor

ROOT = HERE.parents[1]
GROUP_SIZES = (-1, 64, 32)


@dataclass(frozen=True)
class Subject:
    """A model and its texts."""

    name: str
    model: Path
    train: Path  # calibration, and UPQ's training
    heldout: Path
    seq_len: int = 512
    budget: int | None = None  # training tokens of UPQ; None: its recipe's


def stories(data_dir: Path, out: Path) -> Subject:
    model, text = data_dir / "models/stories260K", data_dir / "text"
    return Subject("stories260K", model, text / "tinystories_train.txt", text / "tinystories_heldout.txt")


def reference(data_dir: Path, out: Path) -> Subject:
    """Documents of its world; rotary positions beyond 256 are untrained. UPQ trains on as many tokens as in `demo`."""
    from upq.world import World
    from upq.world.corpus import write_corpus

    texts = {"train.jsonl": (30_000, 1), "heldout.jsonl": (1_000, 2)}  # documents, seed
    for name, (n, seed) in texts.items():
        if not (out / "reference" / name).is_file():
            write_corpus(out / "reference" / name, World(), n=n, seed=seed)
    files = (out / "reference" / name for name in texts)
    return Subject("reference", ROOT / "src/upq/world/reference", *files, 256, budget=300_000)


# By name: from --data-dir and --out to the subject, whose files may still be missing.
SUBJECTS: dict[str, Callable[[Path, Path], Subject]] = {"stories260K": stories, "reference": reference}


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
    data_dir: Annotated[Path, typer.Option(help="Where the subjects' files lie.")] = ROOT.parent / "shared" / "data",
    out: Annotated[Path, typer.Option(help="Environments, finished rows and tables.")] = ROOT / "runs" / "peers",
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name contains this; may be repeated.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    """Build what environments are missing, run what rows are missing, print the table."""
    from table import report

    chosen = find_subject(subject, model, train, heldout, seq_len, data_dir.resolve(), out.resolve())
    console = Console(width=160) if not Console().is_terminal else Console()
    folder = out.resolve() / chosen.name
    folder.mkdir(parents=True, exist_ok=True)
    heldout_NT = None
    for row in (row for row in ROWS if any(part.lower() in row.name.lower() for part in only or [""])):
        made = make(row, chosen, folder / row.folder, out.resolve() / "env")
        if made["error"] is None and not (folder / row.folder / "judged.json").is_file():
            heldout_NT = rows(chosen) if heldout_NT is None else heldout_NT
            judge_row(folder / row.folder, chosen, heldout_NT)
        console.print(f"{row.name}: {made['error'] or 'done'}", highlight=False, markup=False)
    report(list(finished(folder)), chosen.name, folder, console, json_file)


def find_subject(
    name: str, model: Path | None, train: Path | None, heldout: Path | None, seq_len: int, data_dir: Path, out: Path
) -> Subject:
    if model is None:
        if name not in SUBJECTS:
            raise SystemExit(f"subject {name!r} is none of {', '.join(SUBJECTS)}; or name its files with --model")
        found = SUBJECTS[name](data_dir, out)
    elif train is None or heldout is None:
        raise SystemExit("--model needs --train and --heldout")
    elif name in SUBJECTS:
        raise SystemExit(f"--model needs a --subject of its own; {name!r} is taken")
    else:
        found = Subject(name, model.resolve(), train.resolve(), heldout.resolve(), seq_len)
    for path in (found.model, found.train, found.heldout):
        if not path.exists():
            raise SystemExit(f"{path} is missing; name --data-dir, or --model, --train and --heldout")
    return found


def make(row: Row, subject: Subject, folder: Path, environments: Path) -> dict[str, Any]:
    """What `peer.Made` says of this row; the adapter runs unless it has run before."""
    file = folder / "made.json"
    if not file.is_file():
        shutil.rmtree(folder, ignore_errors=True)  # half a row says nothing of time and memory
        folder.mkdir(parents=True)
        try:
            run_adapter(row, subject, folder, python_of(row.peer, environments))
        except NotInstallable as error:
            file.write_text(json.dumps({"version": row.peer, "error": f"not installable: {error}"}))
    made: dict[str, Any] = json.loads(file.read_text())
    return made


def run_adapter(row: Row, subject: Subject, folder: Path, python: Path) -> None:
    job = {
        "model": str(subject.model),
        "text": str(subject.train),
        "tokens": str(calibration(subject, folder.parent)),
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


def calibration(subject: Subject, folder: Path) -> Path:
    from judge import rows_of
    from safetensors.torch import save_file

    file = folder / "calibration.safetensors"
    if not file.is_file():
        save_file({"tokens_NT": rows_of(subject.train, subject.model, subject.seq_len)}, file)
    return file


def rows(subject: Subject) -> Tensor:
    from judge import rows_of

    return rows_of(subject.heldout, subject.model, subject.seq_len)


def judge_row(folder: Path, subject: Subject, heldout_NT: Tensor) -> None:
    from judge import judge

    from upq.core.errors import UPQError

    try:
        judged = asdict(judge(folder / "dense", subject.model, heldout_NT))
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

"""A virtual environment for each peer: one wants transformers 5.17, another 5.23, a third an older numpy."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[1] / "constraints.txt"


class NotInstallable(Exception):
    """pip's reason, in one line."""


def python_of(peer: str, folder: Path) -> Path:
    """The interpreter that runs this peer's adapter: the project's own for UPQ, else one that is built if need be."""
    if peer == "upq":
        return Path(sys.executable)
    requirements = HERE / f"requirements-{peer}.txt"
    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    wanted = hashlib.sha256(f"{torch}\n{requirements.read_text()}".encode()).hexdigest()
    environment = folder / peer
    python, mark = environment / "bin" / "python", environment / "upq-peer.txt"
    if mark.is_file() and mark.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
    # torch alone and first, then held: a peer that may choose brings the CUDA build and several gigabytes.
    constraint = environment / "torch.txt"
    constraint.write_text(torch + "\n")
    _pip(python, torch)
    _pip(python, "--constraint", str(constraint), "--requirement", str(requirements))
    mark.write_text(wanted)
    return python


def _pip(python: Path, *arguments: str) -> None:
    # --no-compile: most of torch and transformers is never imported, and compiling it is most of an installation's time
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines()]
        reason = [line for line in lines if " depends on " in line] or [x for x in lines if x.startswith("ERROR")]
        raise NotInstallable("; ".join(reason)[:400] or f"pip stopped with code {done.returncode}")

"""Tries an installed UPQ, wheel or source distribution, in an empty directory: quantise, measure, chat.

    python -m venv fresh && fresh/bin/pip install dist/upq-*.whl && fresh/bin/python tools/try_installation.py

The model is the one that comes with the package, rounded to the nearest level, so the answer says little.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from importlib.metadata import files
from pathlib import Path

PREPARE = """
from pathlib import Path
from upq.world import World
from upq.world.corpus import write_corpus
from upq.world.reference import REFERENCE
write_corpus(Path("documents.jsonl"), World(), n=400, seed=1)
Path("text.txt").write_text(" ".join(Path("documents.jsonl").read_text().split()[:2000]))
print(REFERENCE)
"""
STAGES = ("generate=null", "distill=null", "int2.method=rtn", "data.validation=4")


def run(folder: str, *command: str) -> str:
    began = time.monotonic()
    # -P: nothing is imported from the directory, not even from this script's.
    done = subprocess.run([sys.executable, "-P", *command], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    print(f"{time.monotonic() - began:6.1f} s  {' '.join(command[1:3]) if command[0] == '-m' else 'text'}", flush=True)
    return done.stdout.strip()


def main() -> None:
    installed = [Path(str(file)) for file in files("upq") or ()]
    print("compiled:", *(path.name for path in installed if path.suffix in (".so", ".pyd")))
    with tempfile.TemporaryDirectory() as folder:
        model = run(folder, "-c", PREPARE)
        choices = [word for stage in STAGES for word in ("--set", stage)]
        data = ("--data", "documents.jsonl", "--recipe", "demo", *choices)
        run(folder, "-m", "upq", "quantize", model, "--out", "artifact", *data)
        print(run(folder, "-m", "upq", "eval", "artifact", "--text", "text.txt", "--against", model))
        answer = run(folder, "-m", "upq", "chat", "artifact", "--max-tokens", "24", "--prompt", "Where is the museum?")
        print(answer)
        if not answer:
            sys.exit("upq chat has no answer")


if __name__ == "__main__":
    main()

"""Coverage-guided fuzzing of everything that reads a stranger's file: `python tools/fuzz.py artifact --seconds 600`.

The law is that of tests/test_hostile.py, and so are the functions (tests/hostile.py): a file is read, or UPQError says
why not. Anything else, or 1 GB of memory more than the imports take, is a finding: libFuzzer stops and leaves the input
in `--crashes`. `--input FILE` runs one such input again. Needs atheris: pip install 'upq[fuzz]'.

An input for `artifact` is the number of a file in its first byte, then that file's content; for `data`, of a kind of
file; for `inputs`, a byte for each choice of a chat template, tokenizer settings and generation settings. The corpus
starts from valid files and grows in `--corpus`, from run to run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[1]
# The loader of an editable installation runs modules as they are, whatever atheris made of them: until this, artifact
# and data had no coverage to be guided by. From the path, Python's own loader takes them.
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
with atheris.instrument_imports(include=["upq", "yaml"]):
    import hostile
    from upq.core.bounded import parse_json
    from upq.core.memory import resident_bytes
    from upq.run.recipe import Recipe, names

assert "_trace_branch" in parse_json.__code__.co_names, "atheris has not instrumented upq"
ROOM = 1 << 30
Run = Callable[[bytes], None]


def artifact(scratch: Path) -> tuple[Run, list[bytes]]:
    places = [(model, file.name) for model in hostile.models(scratch) for file in sorted(model.iterdir())]
    seeds = [bytes([n]) + (model / name).read_bytes() for n, (model, name) in enumerate(places)]

    def run(raw: bytes) -> None:
        model, name = places[raw[0] % len(places)]
        with hostile.with_file(model, name, raw[1:]):
            hostile.read_model(model)

    return run, seeds


def recipe(scratch: Path) -> tuple[Run, list[bytes]]:
    def run(raw: bytes) -> None:
        (scratch / "recipe.yaml").write_bytes(raw)
        hostile.read_recipe(scratch / "recipe.yaml")

    return run, [
        text
        for made in map(Recipe.load, names())
        for text in (made.dump().encode(), json.dumps(made.model_dump(mode="json")).encode())
    ]


def data(scratch: Path) -> tuple[Run, list[bytes]]:
    def run(raw: bytes) -> None:
        file = scratch / hostile.DATA[raw[0] % len(hostile.DATA)]
        file.write_bytes(raw[1:])
        hostile.read_data(file)

    rows = ([{"text": "one"}, {"text": "zwö 二"}], [{"messages": hostile.CONVERSATION}])
    return run, [bytes([n]) + hostile.data_file(name, r) for n, name in enumerate(hostile.DATA) for r in rows]


def inputs(scratch: Path) -> tuple[Run, list[bytes]]:
    base, model = hostile.base(scratch / "base"), scratch / "model"

    def run(raw: bytes) -> None:
        made = hostile.write_input(base, model, raw)
        hostile.use_input(model, made)
        if sum(raw) % 4 == 0:  # a whole run takes as long as ten of the others
            hostile.run_input(model, made)

    return run, [bytes([128 + n]) * 31 for n in range(12)]


TARGETS = {"artifact": artifact, "recipe": recipe, "data": data, "inputs": inputs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "fuzz" / "corpus")
    parser.add_argument("--crashes", type=Path, default=ROOT / "build" / "fuzz" / "crashes")
    parser.add_argument("--input", type=Path, help="run this input alone")
    options = parser.parse_args()
    # libFuzzer leaves by _exit: the folder is the system's to remove.
    run, seeds = TARGETS[options.target](Path(tempfile.mkdtemp(prefix="upq-fuzz-")))

    silence = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)

    def one(raw: bytes) -> None:
        if raw:
            with contextlib.redirect_stderr(silence):  # warnings of the libraries, thousands of times
                run(raw)

    def changed(raw: bytes, room: int, seed: int) -> bytes:
        """By value or by byte; half of the time from a valid file, for libFuzzer goes on from what was new alone."""
        choose = random.Random(seed)
        raw = choose.choice(seeds) if choose.random() < 0.5 else raw
        head = 1 if options.target in ("artifact", "data") else 0
        with contextlib.suppress(ValueError, RecursionError):  # no JSON
            new = raw[:head] + hostile.exchanged(raw[head:], choose)
            if len(new) <= room and choose.random() < 0.75:
                return new
        return bytes(atheris.Mutate(raw[:room], room))

    if options.input:
        one(options.input.read_bytes())
        return
    corpus, crashes = (folder / options.target for folder in (options.corpus, options.crashes))
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for n, seed in enumerate(seeds):
        (corpus / f"seed-{n:03}").write_bytes(seed)
    one(seeds[0])  # what is imported late belongs to the imports
    memory = (resident_bytes() + ROOM) >> 20
    limits = [f"-max_total_time={options.seconds}", f"-rss_limit_mb={memory}", "-timeout=60", "-max_len=131072"]
    settings = ["-mutate_depth=1", f"-artifact_prefix={crashes}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, *settings], one, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

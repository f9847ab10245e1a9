"""A run to be harmed: a tiny model, a recipe that has every stage, and `upq quantize` in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tiny import CHAT, byte_tokenizer, tiny_model
from together import SERVER, redirect
from upq.run.recipe import Recipe

BLOCKS, STEPS = 3, 12
RECIPE: dict[str, Any] = {
    "name": "victim",
    "data": {
        "seq_len": 32,
        "validation": 8,
        "generated": {"tokens": 400, "weight": 0.25, "max_new_tokens": 40, "batch_size": 8},
    },
    "int4": {
        "bits": 4,
        "samples": 8,
        "method": {"name": "flexround", "scale": "max", "iterations": 6, "batch_size": 2},
    },
    "int2": {"bits": 2, "samples": 8, "method": {"name": "block_ap", "scale": "max", "iterations": 6, "batch_size": 2}},
    "distill": {
        "loss": "gjs",
        "hidden": 0.25,
        "tokens": 1536,  # STEPS steps
        "batch_size": 4,
        "micro_batch_size": 2,
        "lr": 1e-3,
        "scale_lr": 1e-3,
        "train_norms": True,
        "checkpoint_every": 2,
    },
    "export": ["dense"],
}


@dataclass(frozen=True)
class Victim:
    """What the command is given."""

    model: Path
    recipe_file: Path

    def recipe(self, *overrides: str) -> Recipe:
        return Recipe.load(str(self.recipe_file), list(overrides))

    def arguments(self, out: Path, *more: str) -> list[str]:
        return ["quantize", str(self.model), "--out", str(out), "--recipe", str(self.recipe_file), *more]


def make_victim(folder: Path) -> Victim:
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT)
    ends = tokenizer.eos_token_id
    model = tiny_model(
        "llama", vocab_size=len(tokenizer), eos_token_id=ends, num_hidden_layers=BLOCKS, max_position_embeddings=128
    )
    with torch.no_grad():  # one coordinate is the same in every token, so that the head can favour the end token
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[ends, 0] = 1.2
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = folder / "text.jsonl"
    lines = (f"Story {i}: the {i}th fox saw {i * 7} geese and {i % 5} bears." for i in range(200))
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": {**RECIPE["data"], "sources": [{"path": str(text)}]}}))
    return Victim(folder / "model", recipe)


@dataclass(frozen=True)
class Unharmed:
    """A run of the same command that nothing happened to."""

    out: Path
    outcome: dict[str, Any]
    operations: int


class Command:
    """`upq ARGUMENTS`, under way, a fork of a server that has the imports; what it prints goes to `log`.

    With `dies_at`, it kills itself (SIGKILL) as it is about to do its so many-th operation on files. Between two of
    them nothing on the disk changes, so these are all the moments there are, but for those within a write.
    """

    def __init__(self, arguments: list[str], log: Path, *, dies_at: int | None = None) -> None:
        self.log = log
        self._process = SERVER.Process(target=_main, args=(arguments, str(log), dies_at))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def end(self, seconds: float = 300) -> int:
        """The exit code, or minus the signal that killed it."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
        assert code is not None, f"still running after {seconds} s: {self.said()}"
        return code

    def operations(self) -> int:
        """How many it has done, where it has come to its end."""
        return int(self.log.with_suffix(".operations").read_text())

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, arrived: Callable[[], bool], seconds: float = 300) -> None:
        """Until `arrived`, while it runs."""
        limit = time.monotonic() + seconds
        while not arrived():
            assert self._process.exitcode is None, f"ended before: {self.said()}"
            assert time.monotonic() < limit, f"not within {seconds} s: {self.said()}"
            time.sleep(0.001)

    def signal(self, signum: int) -> None:
        """Nothing where it has ended by itself."""
        if self._process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)


def _main(arguments: list[str], log: str, dies_at: int | None) -> None:
    redirect(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    sys.argv = ["upq", *arguments]
    from upq.cli import main

    if "--out" not in arguments:
        main()
    out, done = str(Path(arguments[arguments.index("--out") + 1])), 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        # shutil.rmtree names files by their directory's descriptor, the last argument.
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and (
            str(args[0]).startswith(out) or (event in ("os.remove", "os.rmdir") and args[-1] != -1)
        ):
            done += 1
            if done == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        main()
    finally:
        Path(log).with_suffix(".operations").write_text(str(done))


def outcome(out: Path) -> dict[str, Any]:
    """All that a run leaves, without what its clocks, its memory and the place made of it."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.name == "README.md":  # made of the manifest
            continue
        if path.name in ("upq.json", "export.json"):
            clocks = ("seconds", "peak_memory_bytes", "artifact", "artifact_digest")
            content = json.loads(path.read_text().replace(str(out), "OUT"))
            found[name] = {key: value for key, value in content.items() if key not in clocks}
        elif path.name == "metrics.jsonl":
            clocks = ("seconds", "peak_memory_bytes")
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in line.items() if key not in clocks} for line in lines]
        else:
            found[name] = path.read_bytes()
    return found

"""What `upq plan` says against runs: `python benchmarks/plan.py`

Random models of several sizes go the whole way, each in a process of its own; the peak of memory is taken anew for each
stage (Linux). Rows, iterations and steps are few, since memory does not depend on how many there are; the time is
compared for those few. Conversations are left out: a random model ends none. `--model DIR --set generate.tokens=20000`
takes a real model in the place of random ones, with conversations. The size 2048 is Llama 3.2 1B, 4096 is Llama 3.1 8B;
with `--memory` a run has the settings that are planned for so much.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from _alone import run_alone
from _table import Figure, Table, make_console, show_figures, write_figures

SIZES = (256, 512, 1024)
LAYERS = {256: 8, 512: 6, 1024: 4, 2048: 16, 4096: 32}
VOCABULARY = {2048: 128_256, 4096: 128_256}
MLP = {4096: 14_336}  # of the others four times the hidden size
UNTIED = {4096}
TOKENS = 32  # of other vocabularies for each unit of the hidden size, as in Llama's first versions
OFF = 0.15  # of memory, either way
FLEXROUND = {"name": "flexround", "scale": "mse", "relative": True, "iterations": 2, "batch_size": 2}
INT4 = {"stage": "blockwise", "bits": 4, "samples": 8, "method": FLEXROUND}
SETTINGS = (
    "generate=null", "data.seq_len=256", "data.validation=4",
    "int2.samples=8", "int2.method.iterations=2", "distill.tokens=2048",
)  # fmt: skip

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    sizes: Annotated[list[int], typer.Option(min=64, help="A multiple of 64; repeatable.")] = [*SIZES],  # noqa: B006
    set_: Annotated[list[str], typer.Option("--set", help="Of the recipe; repeatable.")] = [],  # noqa: B006
    memory: Annotated[float | None, typer.Option(min=1, help="GB that a run is to fit; default: any.")] = None,
    real: Annotated[
        Path | None, typer.Option("--model", help="A model that ends its answers, not random ones.")
    ] = None,
    blocks: Annotated[int, typer.Option(min=0, help="Of each model; 0: those of its size.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where the files go for the time being.")] = None,
) -> None:
    console, rows, figures = make_console(), [], []
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for size in sizes if real is None else [real.name]:
            model = Path(folder) / f"model-{size}"
            if real is None:
                run_alone(__file__, "make", model, size, blocks)
            else:
                link(real, model)
            planned = run_alone(__file__, "planned", model, memory or 10**6, *set_)
            settings = planned.pop("settings")
            console.print(" ".join(["settings:", *settings]), highlight=False, soft_wrap=True)
            measured = run_alone(__file__, "measured", model, Path(folder) / f"out-{size}", *set_, *settings)
            name_of = "hidden size {}" if real is None else "{}"
            if memory is not None:
                peak = max(found for found, _ in measured.values()) / 1e9
                name = f"peak of the run, {name_of.format(size)}"
                figures.append(Figure(name, peak, "GB", f"<= {memory:g}", peak <= memory))
            for stage, (held, seconds) in measured.items():
                expected, estimate = planned[stage]
                ratio = expected / held
                times = (f"{estimate:,.0f}", f"{seconds:,.0f}", f"{estimate / seconds:.2f}") if estimate else ("–",) * 3
                sizes_shown = (f"{expected / 1e6:,.0f}", f"{held / 1e6:,.0f}", f"{ratio:.2f}")
                rows.append((f"{size}, {stage}", *sizes_shown, *times))
                target, ok = f"{1 - OFF:.2f} to {1 + OFF:.2f}", abs(ratio - 1) <= OFF
                figures.append(
                    Figure(f"memory of {stage}, {name_of.format(size)}, planned over measured", ratio, "", target, ok)
                )
    head = ("hidden size, stage", "planned, MB", "peak, MB", "ratio", "planned, s", "took, s", "ratio")
    Table("What was planned and what was measured", head, tuple(rows)).show(console)
    show_figures(figures, console)
    if json_file is not None:
        write_figures(figures, json_file)
    raise typer.Exit(not all(figure.ok for figure in figures))


def make(folder: Path, hidden: int, blocks: int) -> None:
    """A random Llama with a tokenizer of bytes, and a text beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import memory

    folder.mkdir()
    vocabulary = VOCABULARY.get(hidden, TOKENS * hidden)
    memory.make(
        folder, blocks or LAYERS.get(hidden, 4), hidden, vocabulary, mlp=MLP.get(hidden), tied=hidden not in UNTIED
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    write_text(folder)


def link(model: Path, folder: Path) -> None:
    """A model's files and, beside them, the text."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    write_text(folder)


def write_text(folder: Path) -> None:
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz  ", k=200_000)
    lines = ("".join(letters[i : i + 200]) for i in range(0, len(letters), 200))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def load_recipe(model: Path, overrides: list[str]) -> Any:
    from upq.run.recipe import Recipe

    source = f"data.sources=[{{path: {model / 'text.jsonl'}}}]"
    writes = any(override.startswith("generate.") for override in overrides)
    raw = Recipe.load(
        "default", [source, *(each for each in SETTINGS if not (writes and each == "generate=null"))]
    ).model_dump(mode="json")
    return Recipe.of({**raw, "stages": {"int4": INT4, **raw["stages"]}}, "benchmark").changed(overrides)


def planned(model: Path, gigabytes: float, overrides: list[str]) -> None:
    """Memory and seconds of each stage, as this machine plans it, and the settings that make it fit."""
    from upq.model.loading import load_config
    from upq.run.plan import plan, this_speed
    from upq.stages._sizes import Machine

    machine = Machine(int(gigabytes * 1e9), speed=this_speed())
    made = plan(load_config(model), load_recipe(model, overrides), machine)
    stages = {stage.name: (stage.memory, stage.seconds) for stage in made.stages}
    print(json.dumps({**stages, "settings": made.settings}))


def measured(model: Path, out: Path, overrides: list[str]) -> None:
    """The whole way; answers with the peak and the seconds of each stage."""
    from upq.core.memory import peak_memory_bytes
    from upq.core.progress import Silent
    from upq.run import run as pipeline
    from upq.run.quiet import quiet_libraries

    class Peaks(Silent):
        """A new peak after each unit: what comes after a stage's last one, such as loading, is the next stage's.

        But for the check, which announces itself at its beginning: freezing what was trained is the training's.
        """

        def __init__(self) -> None:
            self.found: dict[str, tuple[int, float]] = {}
            self._stage, self._last = "", time.monotonic()

        def start(self, stage: str, *, done: int = 0) -> None:
            if stage == "check":  # the end of the training, its moments and codes, is the training's
                self.advance()
            if stage == "check":
                self.advance(0)
            self._stage = stage

        def advance(self, units: int = 1, **figures: float) -> None:
            now = time.monotonic()
            peak, seconds = self.found.get(self._stage, (0, 0.0))
            self.found[self._stage] = (max(peak, peak_memory_bytes()), seconds + now - self._last)
            self._last = now
            Path("/proc/self/clear_refs").write_text("5")

    quiet_libraries()
    peaks = Peaks()
    pipeline.quantize(model, load_recipe(model, overrides), out, device="cpu", progress=peaks)
    print(json.dumps(peaks.found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        print("{}")
    elif sys.argv[1:2] == ["planned"]:
        planned(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    elif sys.argv[1:2] == ["measured"]:
        measured(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        app()

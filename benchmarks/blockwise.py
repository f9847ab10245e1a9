"""FlexRound against AutoRound on one random block: `python benchmarks/blockwise.py`

A Llama of a single block in bfloat16, so that each library quantises the same block, from the same tokens, with the
same number of iterations, rows and threads, to 4 bits, one scale a row. Each runs in a process of its own, AutoRound
in the environment of benchmarks/peers. Timed is the call that quantises, from the tokens to the weights; loading and
imports are not. The error is measured by one code for both: mean squared difference of the block's output in float32.
`products` are those iterations with nothing quantised, forward and back: what no method can be faster than.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from _alone import run_alone
from _table import Figure, Table, make_console, show_figures, spread, write_figures

if TYPE_CHECKING:
    from torch import Tensor

    from upq.blockwise import BlockTask
    from upq.core.precision import Precision

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).resolve().parent / "peers"
VOCABULARY = 1024  # a block knows nothing of it

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    hidden: Annotated[int, typer.Option(min=64, help="A multiple of 64; 2048 is Llama 3.2 1B.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows.")] = 128,
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens of a row.")] = 512,
    iterations: Annotated[int, typer.Option(min=1)] = 200,
    fewer: Annotated[int | None, typer.Option(min=1, help="Iterations of FlexRound, if not as many.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows an iteration.")] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="Of weights and tokens.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="With one, the clock is the processor's.")] = 1,
    autocast: Annotated[bool, typer.Option(help="Both in bfloat16 where the CPU has it, as by default.")] = True,
    compiled: Annotated[bool, typer.Option(help="AutoRound through torch.compile, its default.")] = True,
    environments: Annotated[Path, typer.Option(help="Of benchmarks/peers.")] = ROOT / "runs" / "peers" / "env",
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where the files go for the time being.")] = None,
) -> None:
    sys.path.insert(0, str(PEERS))
    from environment import python_of

    python, clock = python_of("autoround", environments.resolve()), "cpu_seconds" if threads == 1 else "seconds"
    found: list[tuple[float, float, float, float]] = []
    floor: list[float] = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(dir=work) as name:
            folder, sizes = Path(name), (iterations, batch_size)
            write_inputs(folder, hidden, samples, seq_len, seed)
            precision = "auto" if autocast else "fp32"
            own = (fewer or iterations, batch_size)
            ours = run_alone(__file__, "solve", folder, *own, seed, precision, threads=threads)
            script, choices = PEERS / "block_with_autoround.py", (int(autocast), int(compiled))
            floor.append(run_alone(__file__, "products", folder, *sizes, precision, threads=threads)[clock])
            theirs = run_alone(script, folder, *sizes, seed, *choices, python=python, threads=threads)
            errors = judge(folder)
        found.append((ours[clock], theirs[clock], *errors))
    console = make_console()
    taken = f"{fewer} and {iterations}" if fewer else f"{iterations}"
    title = f"hidden size {hidden}, {samples} x {seq_len} tokens, {taken} iterations of {batch_size} rows, "
    title += f"{threads} threads, {'processor' if threads == 1 else 'wall'} seconds; "
    title += f"UPQ: {'bfloat16' if ours['bf16'] else 'float32'}; AutoRound: {theirs['settings']}"
    table(title, found).show(console)
    console.print(f"products of {iterations} iterations alone: {spread(floor, '.1f')} s", highlight=False)
    figures = compare(found)
    show_figures(figures, console)
    if json_file is not None:
        write_figures(figures, json_file)
    raise typer.Exit(not all(figure.ok for figure in figures))


def table(title: str, found: list[tuple[float, float, float, float]]) -> Table:
    head = ("seed", "UPQ, s", "AutoRound, s", "ratio", "UPQ error", "AutoRound error", "ratio")
    lines = [(a, b, a / b, c, d, c / d) for a, b, c, d in found]
    styles = (".1f", ".1f", ".3f", ".4g", ".4g", ".3f")
    rows = [(str(n), *(f"{v:{style}}" for v, style in zip(line, styles, strict=True))) for n, line in enumerate(lines)]
    rows.append(("all", *(spread(column, style) for column, style in zip(zip(*lines), styles, strict=True))))  # noqa: B905
    return Table(title, head, tuple(rows))


def compare(found: list[tuple[float, float, float, float]]) -> list[Figure]:
    """Of seconds and errors of UPQ and AutoRound a seed: the means over the seeds of UPQ's over AutoRound's."""
    seconds = sum(a / b for a, b, _, _ in found) / len(found)
    error = sum(c / d for _, _, c, d in found) / len(found)
    return [
        Figure("seconds a block, UPQ over AutoRound", seconds, "", "<= 0.8", seconds <= 0.8),
        Figure("block error, UPQ over AutoRound", error, "", "<= 1", error <= 1),
    ]


def write_inputs(folder: Path, hidden: int, samples: int, seq_len: int, seed: int) -> None:
    """model/ and tokens.safetensors, with a tokenizer, which AutoRound wants though it is given tokens."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from safetensors.torch import save_file

    from memory import make
    from tiny import byte_tokenizer

    make(folder / "model", layers=1, hidden=hidden, vocabulary=VOCABULARY, seed=seed)
    byte_tokenizer(bos="<s>", eos="</s>").save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(seed)
    tokens_NT = torch.randint(VOCABULARY, (samples, seq_len), generator=generator)
    save_file({"tokens_NT": tokens_NT}, folder / "tokens.safetensors")


def solve(folder: Path, iterations: int, batch_size: int, seed: int, precision: Precision) -> dict[str, Any]:
    """FlexRound; leaves upq.safetensors, the weights (O, I) of the block's linears."""
    from safetensors.torch import load_file, save_file

    from upq.blockwise import METHODS, BlockStore, walk
    from upq.core.precision import computes_in_bf16
    from upq.core.progress import Silent
    from upq.core.scheme import QuantScheme
    from upq.model.source import Source

    tokens_NT = load_file(folder / "tokens.safetensors")["tokens_NT"]
    source = Source(folder / "model")
    flexround = METHODS.get("flexround")
    method = flexround(flexround.Config(iterations=iterations, batch_size=batch_size))
    store = BlockStore(folder / "blocks", QuantScheme(bits=4), latents=False)
    wall, cpu = time.monotonic(), time.process_time()
    walk(source, tokens_NT, method, store, given=None, seed=seed, progress=Silent(), precision=precision)
    bf16 = computes_in_bf16(precision, source.device, source.text.hidden_size)
    seconds = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu, "bf16": bf16}
    save_file(store.weights(0), folder / "upq.safetensors")
    return seconds


def products(folder: Path, iterations: int, batch_size: int, precision: Precision) -> dict[str, Any]:
    """The block's own weights, each with a gradient, in place of quantised ones."""
    from safetensors.torch import load_file

    task = only_block(folder, load_file(folder / "tokens.safetensors")["tokens_NT"][:batch_size], precision)
    weights = {name: w_OI.requires_grad_() for name, w_OI in task.weights().items()}
    wall, cpu = time.monotonic(), time.process_time()
    for _ in range(iterations):
        task.loss(weights, slice(None)).backward()
        for w_OI in weights.values():
            w_OI.grad = None
    return {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}


def only_block(folder: Path, tokens_NT: Tensor, precision: Precision) -> BlockTask:
    """The block of the model, to be solved for some rows."""
    from upq.blockwise import BlockTask
    from upq.blockwise._base import ORIGINAL
    from upq.core.precision import computes_in_bf16
    from upq.model.source import Source
    from upq.model.walker import walk

    source = Source(folder / "model")
    bf16 = computes_in_bf16(precision, source.device, source.text.hidden_size)
    (step,) = walk(source, tokens_NT, streams=2, bf16=bf16)
    block = source.block(0)
    step.advance(block, stream=ORIGINAL)
    return BlockTask(step, block, seed=0)


def judge(folder: Path) -> tuple[float, float]:
    """Errors of the block's output over all rows, UPQ's and AutoRound's."""
    from safetensors.torch import load_file

    task = only_block(folder, load_file(folder / "tokens.safetensors")["tokens_NT"], "fp32")
    errors = []
    for name in ("upq", "autoround"):
        weights = load_file(folder / f"{name}.safetensors")
        for linear, w_OI in task.weights().items():
            found_OI = weights[linear]
            assert found_OI.shape == w_OI.shape
            assert not found_OI.equal(w_OI), f"{name} left {linear} as it was"
            assert all(row.unique().numel() <= 16 for row in found_OI), f"{name}: {linear} has more than 16 levels"
        errors.append(task.error(weights))
    return errors[0], errors[1]


if __name__ == "__main__":
    if sys.argv[1:2] in (["solve"], ["products"]):
        import json

        inputs, *numbers, chosen = sys.argv[2:]
        run = solve if sys.argv[1] == "solve" else products
        print(json.dumps(run(Path(inputs), *map(int, numbers), precision=chosen)))
    else:
        app()

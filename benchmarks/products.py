"""CPU kernels on the linears of a model of a billion weights, cold from memory: `python benchmarks/products.py`.

The shapes are those of Llama-3.2-1B with an untied head of 32,000 rows. Every weight has memory of its own, 260 MB at 2
bits, so none is in a cache when its turn comes, as in decoding. Weights are random; speed does not depend on them.
A plain read of as many bytes in the same process is the ruler for one token. (Not `kernels.py`: transformers takes any
module of that name on the path for its own kernels package, and fails.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from _table import make_console
from upq import kernels
from upq.kernels import cpu, reference

H, KV, UP, VOCABULARY, BLOCKS = 2048, 512, 8192, 32_000, 16
# Linears that read one input: their rows, and the columns they share.
BLOCK = (((H, KV, KV), H), ((H,), H), ((UP, UP), H), ((H,), UP))

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bits: Annotated[int, typer.Option(min=2, max=8)] = 2,
    group_size: Annotated[int, typer.Option(help="-1: one scale a row.")] = -1,
    tokens: Annotated[str, typer.Option(help="Tokens a call, separated by commas.")] = "1,8,64",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    compute: Annotated[str, typer.Option(help="w2a8 or w2a16.")] = "w2a8",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    dense: Annotated[bool, typer.Option(help="bfloat16 linears of torch as well (2 GB).")] = False,
) -> None:
    """Medians (best) over the repeats. UPQ_CPU_ISA chooses the instruction set."""
    torch.set_num_threads(threads)
    console = make_console()
    console.print(f"{compute} on {cpu.instruction_set()}, {threads} threads, {bits} bits, group size {group_size}")
    calls = [call for _ in range(BLOCKS) for call in BLOCK] + [((VOCABULARY,), H)]
    weights = [[packed(rows, columns, bits, group_size) for rows in outs] for outs, columns in calls]
    held = sum(w.matrix().nbytes for call in weights for w in call)
    products = sum(sum(outs) * columns for outs, columns in calls)
    ruler = torch.zeros(held // 8, dtype=torch.int64)
    with kernels.computing(compute), torch.inference_mode():
        for m in map(int, tokens.split(",")):
            x = {columns: torch.randn(m, columns).bfloat16() for _, columns in BLOCK}
            run = lambda: [kernels.linears(x[w[0].in_features], w) for w in weights]  # noqa: B023, E731
            median, best = seconds(run, repeats)
            line = f"{m} tokens: {1e3 * median:.2f} ms ({1e3 * best:.2f}), {m / median:.0f} tokens/s ({m / best:.0f}), "
            line += f"{products * m / median / 1e9:.0f} GMAC/s ({products * m / best / 1e9:.0f})"
            if m == 1:
                read = seconds(lambda: ruler.sum(), repeats)[0]
                line += f", {held / median / 1e9:.1f} GB/s, {read / median:.0%} of a plain read"
            console.print(line, highlight=False)
            if dense:
                compare(console, m, [(sum(outs), columns) for outs, columns in calls], x, repeats)


def packed(rows: int, columns: int, bits: int, group_size: int) -> kernels.Weight:
    codes = torch.randint(0, 256, (rows, reference.row_bytes(columns, bits)), dtype=torch.uint8)
    groups = 1 if group_size == -1 else columns // group_size
    weight = kernels.Weight(codes, torch.rand(rows, groups).half(), (2**bits - 1) / 2, bits=bits, in_features=columns)
    weight.matrix()
    return weight


def compare(console: Console, m: int, shapes: list[tuple[int, int]], x: dict[int, Tensor], repeats: int) -> None:
    weights = [torch.empty(shape, dtype=torch.bfloat16).fill_(0.01) for shape in shapes]
    median, best = seconds(lambda: [F.linear(x[w.shape[1]], w) for w in weights], repeats)
    console.print(f"   torch, bfloat16: {m / median:.0f} tokens/s ({m / best:.0f})", highlight=False)


def seconds(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and best of the wall clock."""
    run()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found), min(found)


if __name__ == "__main__":
    app()

"""CPU kernels on the linears of a model of a billion weights, cold from memory: `python benchmarks/products.py`.

The shapes are those of Llama-3.2-1B with an untied head of 32,000 rows. Every weight has memory of its own, 260 MB at 2
bits, so none is in a cache when its turn comes, as in decoding. Weights are random; speed does not depend on them.
Engines and a plain read of as many bytes take turns. (Not `kernels.py`: transformers takes any module of that name on
the path for its own kernels package, and fails.)

    upq            as layers call it, one call after the other from Python
    torch          dense bfloat16 (--against torch, 2 GB)
    onnxruntime    MatMulNBits at 2 bits and int8 inputs, groups of 128 (--against onnxruntime; from the extra `export`)

`--compiled` builds and runs products.cpp: the kernels without Python in between, as in the compiled decoder.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from _table import Figure, Table, make_console, show_figures, write_figures
from upq import kernels
from upq.core.memory import on_huge_pages
from upq.kernels import cpu, reference

ROOT = Path(__file__).resolve().parents[1]
H, KV, UP, VOCABULARY, BLOCKS = 2048, 512, 8192, 32_000, 16
# Linears that read one input: their rows, and the columns they share.
BLOCK = (((H, KV, KV), H), ((H,), H), ((UP, UP), H), ((H,), UP))
CALLS = BLOCK * BLOCKS + (((VOCABULARY,), H),)
PRODUCTS = sum(sum(rows) * columns for rows, columns in CALLS)  # of one token

Linears = Callable[[dict[int, Tensor]], object]  # all of them, on tokens by their width


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of the weights, and seconds of each engine, `read` among them, in every repeat."""

    held: int
    seconds: dict[str, list[float]]


def main(
    bits: Annotated[int, typer.Option(min=2, max=8)] = 2,
    group_size: Annotated[int, typer.Option(help="-1: one scale a row.")] = -1,
    tokens: Annotated[str, typer.Option(help="Tokens a call, separated by commas.")] = "1,8,64,512",
    threads: Annotated[int, typer.Option(min=1, help="With one, the clock is the processor's.")] = 1,
    compute: Annotated[str, typer.Option(help="w2a8 or w2a16.")] = "w2a8",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    against: Annotated[list[str] | None, typer.Option(help="Of torch, onnxruntime; repeatable.")] = None,
    compiled: Annotated[bool, typer.Option(help="The kernels alone, one thread, w2a8, built by cmake.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    """Medians over the repeats, ratios within a repeat. UPQ_CPU_ISA chooses the instruction set."""
    if compiled:
        if threads > 1 or compute != "w2a8" or against or os.environ.get("UPQ_CPU_ISA"):
            raise typer.BadParameter("--compiled is one thread of w2a8 on the fastest instruction set, alone")
        program = build()
        runs = {m: without_python(program, m, repeats, bits, group_size) for m in map(int, tokens.split(","))}
        show(f"without Python: {title(bits, group_size, threads, compute, repeats)}", group_size, runs, json_file)
        return
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    weights = [[packed(rows, columns, bits, group_size) for rows in outs] for outs, columns in CALLS]
    engines: dict[str, Linears] = {"upq": lambda x: [kernels.linears(x[w[0].in_features], w) for w in weights]}
    for name in against or ():
        engines[name] = {"torch": dense, "onnxruntime": onnxruntime}[name](threads)
    held = sum(w.matrix().nbytes for call in weights for w in call)
    ruler = on_huge_pages(held)
    runs = {}
    with kernels.computing(compute), torch.inference_mode():
        for m in map(int, tokens.split(",")):
            x = {columns: torch.randn(m, columns).bfloat16() for _, columns in BLOCK}
            runs[m] = Run(held, in_turns({"read": lambda _: ruler.sum(), **engines}, x, repeats, clock))
    show(title(bits, group_size, threads, compute, repeats), group_size, runs, json_file)


def title(bits: int, group_size: int, threads: int, compute: str, repeats: int) -> str:
    scales = "one scale a row" if group_size == -1 else f"groups of {group_size}"
    return f"{compute} on {cpu.instruction_set()}, {threads} threads, {bits} bits, {scales}; medians of {repeats}"


def show(headline: str, group_size: int, runs: Mapping[int, Run], json_file: Path | None) -> None:
    """A row for each number of tokens and engine, and the figures with their targets."""
    console = make_console()
    head = ("", "tokens", "ms", "tokens/s", "GMAC/s", "GB/s", "of a read", "upq is")
    rows = [row(name, m, run) for m, run in runs.items() for name in run.seconds if name != "read"]
    Table(headline, head, tuple(rows)).show(console)
    figures = [figure for m, run in runs.items() for figure in targets(m, group_size, run.seconds)]
    show_figures(figures, console)
    if json_file is not None:
        write_figures(figures, json_file)


def in_turns(
    engines: Mapping[str, Linears], x: dict[int, Tensor], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each engine in every repeat; a first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, run in engines.items():
            began = clock()
            run(x)
            if repeat:
                found[name].append(clock() - began)
    return found


def ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def row(name: str, m: int, run: Run) -> tuple[str, ...]:
    held, seconds = run.held, run.seconds
    median = statistics.median(seconds[name])
    read = ("", "")
    if name == "upq" and m == 1:  # of more tokens the codes are not what takes the time
        read = (f"{held / median / 1e9:.1f}", f"{ratio(seconds['read'], seconds[name]):.0%}")
    faster = "" if name == "upq" else f"{ratio(seconds[name], seconds['upq']):.2f} ×"
    return (
        name, f"{m}", f"{1e3 * median:.2f}", f"{m / median:.0f}", f"{PRODUCTS * m / median / 1e9:.0f}", *read, faster,
    )  # fmt: skip


def targets(m: int, group_size: int, seconds: dict[str, list[float]]) -> Iterator[Figure]:
    about = f"{m} tokens, {'per channel' if group_size == -1 else f'groups of {group_size}'}"
    rate = PRODUCTS * m / statistics.median(seconds["upq"]) / 1e9
    if m == 1:
        share = ratio(seconds["read"], seconds["upq"])
        yield Figure(f"{about}: share of a plain read", share, "", ">= 0.85", share >= 0.85)
    if (least := 300 if m >= 64 else 200 if m >= 8 else None) is not None:
        yield Figure(f"{about}: products", rate, "GMAC/s", f">= {least}", rate >= least)
    for name, at_one in {"torch": 15.0, "onnxruntime": 1.8}.items():
        if name in seconds:
            faster, least = ratio(seconds[name], seconds["upq"]), at_one if m == 1 else 1.0
            yield Figure(f"{about}: against {name}", faster, "×", f">= {least:g}", faster >= least)


# --- without Python ------------------------------------------------------------------------------------------------


def build() -> Path:
    folder = ROOT / "build" / "products"
    settings = ["-S", str(ROOT), "-B", str(folder), "-DUPQ_TEST=ON"]
    for step in (settings, ["--build", str(folder), "--target", "products", "--parallel"]):
        subprocess.run([Path(sys.executable).with_name("cmake"), *step], check=True, stdout=subprocess.DEVNULL)
    return folder / "products"


def without_python(program: Path, m: int, repeats: int, bits: int, group_size: int) -> Run:
    calls = ["+".join(map(str, rows)) + f":{columns}" for rows, columns in CALLS]
    numbers = [str(number) for number in (m, repeats, bits, group_size)]
    done = subprocess.run([program, *numbers, *calls], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return Run(found["held"], {"read": found["read"], "upq": found["upq"]})


# --- engines -------------------------------------------------------------------------------------------------------


def packed(rows: int, columns: int, bits: int, group_size: int) -> kernels.Weight:
    codes = torch.randint(0, 256, (rows, reference.row_bytes(columns, bits)), dtype=torch.uint8)
    groups = 1 if group_size == -1 else columns // group_size
    weight = kernels.Weight(codes, torch.rand(rows, groups).half(), (2**bits - 1) / 2, bits=bits, in_features=columns)
    weight.matrix()
    return weight


def dense(threads: int) -> Linears:
    weights = [torch.empty(sum(rows), columns, dtype=torch.bfloat16).fill_(0.01) for rows, columns in CALLS]
    return lambda x: [F.linear(x[w.shape[1]], w) for w in weights]


def onnxruntime(threads: int) -> Linears:
    """One graph of all linears, in the form of its fast kernels: integer zero points (2, the default), int8 inputs."""
    import numpy as np
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    group, generator = 128, np.random.default_rng(0)
    nodes, outputs, weights = [], [], []
    for rows, columns in ((r, columns) for outs, columns in CALLS for r in outs):
        name, blocks = f"{len(nodes)}", columns // group
        codes = generator.integers(0, 256, (rows, blocks, group // 4), np.uint8)
        scales = np.full(rows * blocks, 0.01, np.float32)
        weights += [onnx.numpy_helper.from_array(codes, f"w{name}"), onnx.numpy_helper.from_array(scales, f"s{name}")]
        how: dict[str, Any] = {"K": columns, "N": rows, "bits": 2, "block_size": group, "accuracy_level": 4}
        inputs = [f"x{columns}", f"w{name}", f"s{name}"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [name], domain="com.microsoft", **how))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", rows]))
    given = [helper.make_tensor_value_info(f"x{columns}", TensorProto.FLOAT, ["m", columns]) for columns in (H, UP)]
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "linears", given, outputs, weights)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {f"x{columns}": x[columns].float().numpy() for columns in (H, UP)})


if __name__ == "__main__":
    typer.run(main)

"""Packed products on a CUDA device against dense ones and the memory's own speed: `python benchmarks/gpu.py`.

Every linear of Llama-3.2-1B and Llama-3.1-8B, the head at 4 bits. Each is there in as many copies as four second-level
caches hold, and a pass goes through all of them, so none is in a cache when its turn comes. A pass is one CUDA graph:
what is measured is the device, and not how fast Python launches (--eager: without graphs, as transformers' loop calls
them). Engines take turns; weights are random. (Not `cuda.py`: libraries import a package of that name.)

    upq        kernels.linear: gemlite with exact weights, bytes of codes, scales and sums in float32 (extra `cuda`)
    torch      dense bfloat16
    gemlite    packed by its own helper: words of 32 bits; scales, zeros and sums in bfloat16 (--against gemlite)
    humming    humming-kernels, scales and zero points in bfloat16 (--against humming; at 2 bits, so not the head)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from _table import Figure, Table, make_console, show_figures, write_figures
from upq import kernels
from upq.kernels import reference

VOCABULARY = 128_256
NEAR = 0.1  # relative: further off it is another product, and its speed of no use

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Linear:
    """Which ones, how many of them a model has, and their shape."""

    name: str
    number: int
    rows: int
    columns: int
    bits: int = 2


def shapes(hidden: int, kv: int, up: int, blocks: int) -> tuple[Linear, ...]:
    return (
        Linear("q, o", 2 * blocks, hidden, hidden),
        Linear("k, v", 2 * blocks, kv, hidden),
        Linear("gate, up", 2 * blocks, up, hidden),
        Linear("down", blocks, hidden, up),
        Linear("head", 1, VOCABULARY, hidden, bits=4),
    )


MODELS = {"1B": shapes(2048, 512, 8192, 16), "8B": shapes(4096, 1024, 14_336, 32)}


@dataclass(frozen=True, slots=True)
class Found:
    """Of one linear: milliseconds of a product by each engine and GB/s of a stream, both in every repeat; bytes of the
    packed weight; how far each engine's product is off, relative.
    """

    model: str
    linear: Linear
    tokens: int
    held: int
    milliseconds: Mapping[str, Sequence[float]]
    stream: Sequence[float]
    errors: Mapping[str, float]

    def share(self) -> list[float]:
        """Of the stream, in every repeat."""
        pairs = zip(self.milliseconds["upq"], self.stream, strict=True)
        return [self.held / ms / 1e6 / stream for ms, stream in pairs]

    def faster(self, than: str) -> float:
        pairs = zip(self.milliseconds[than], self.milliseconds["upq"], strict=True)
        return statistics.median(other / own for other, own in pairs)


def main(
    model: Annotated[list[str] | None, typer.Option(help="Of 1B, 8B; repeatable. All if not given.")] = None,
    group_size: Annotated[int, typer.Option(help="-1: one scale a row.")] = -1,
    tokens: Annotated[str, typer.Option(help="Tokens a call, separated by commas.")] = "1,8,64,512",
    repeats: Annotated[int, typer.Option(min=1)] = 21,
    against: Annotated[list[str] | None, typer.Option(help="Of gemlite, humming; repeatable.")] = None,
    eager: Annotated[bool, typer.Option(help="Without CUDA graphs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
) -> None:
    """Medians over the repeats, ratios within a repeat."""
    if not torch.cuda.is_available():
        typer.echo(f"benchmarks/gpu.py measures a CUDA device, and torch {torch.__version__} finds none here", err=True)
        raise typer.Exit(2)
    engines: dict[str, Callable[..., Product]] = {"upq": upq, "torch": dense}
    engines |= {name: {"gemlite": gemlite, "humming": humming}[name] for name in against or ()}
    stream = Stream()
    with kernels.computing("w2a16"), torch.no_grad():
        found = [
            measure(name, linear, m, group_size, engines, stream, repeats, eager)
            for name in model or MODELS
            for linear in MODELS[name]
            for m in map(int, tokens.split(","))
        ]
    console = make_console()
    scales = "one scale a row" if group_size == -1 else f"groups of {group_size}"
    speed = statistics.median(gbs for f in found for gbs in f.stream)
    title = (
        f"{torch.cuda.get_device_name()}, {'called one by one' if eager else 'CUDA graphs'}, 2 bits, {scales}; "
        f"a stream of {speed:.0f} GB/s; medians of {repeats}"
    )
    head = ("", "engine", "tokens", "µs", "GB/s", "of the stream", "upq is", "error")
    Table(title, head, tuple(row for f in found for row in rows(f))).show(console)
    figures = [*judge(found)]
    show_figures(figures, console)
    if json_file is not None:
        write_figures(figures, json_file)


def rows(found: Found) -> Iterator[tuple[str, ...]]:
    for name, milliseconds in found.milliseconds.items():
        median = statistics.median(milliseconds)
        what = f"{found.model} {found.linear.name} {found.linear.rows} × {found.linear.columns}"
        read = ("", "")
        if name == "upq" and found.tokens == 1:  # of more tokens the codes are not what takes the time
            read = (f"{found.held / median / 1e6:.0f}", f"{statistics.median(found.share()):.0%}")
        faster = "" if name == "upq" else f"{found.faster(name):.2f} ×"
        yield what, name, f"{found.tokens}", f"{1e3 * median:.1f}", *read, faster, f"{found.errors[name]:.1e}"


def judge(found: Sequence[Found]) -> Iterator[Figure]:
    """At one token the bytes of all linears of a model over their time; of more tokens the slowest of its linears."""
    for model, m in dict.fromkeys((f.model, f.tokens) for f in found):
        here = [f for f in found if (f.model, f.tokens) == (model, m)]
        about = f"{model}, {m} tokens" if m > 1 else f"{model}, 1 token"
        if m == 1:
            held = sum(f.linear.number * f.held for f in here)
            # The time of one repeat is what its stream would have read in it, in bytes.
            meanwhile = [sum(f.linear.number * f.held / f.share()[i] for f in here) for i in range(len(here[0].stream))]
            share = statistics.median(held / bytes_ for bytes_ in meanwhile)
            yield Figure(f"{about}: share of the stream", share, "", ">= 0.6", share >= 0.6)
        slowest = min(here, key=lambda f: f.faster("torch"))
        faster = slowest.faster("torch")
        yield Figure(f"{about}: against torch, {slowest.linear.name}", faster, "×", ">= 1", faster >= 1)


# --- on the device -------------------------------------------------------------------------------------------------


def measure(
    model: str,
    linear: Linear,
    m: int,
    group_size: int,
    engines: Mapping[str, Callable[..., Product]],
    stream: Stream,
    repeats: int,
    eager: bool,
) -> Found:
    x = torch.randn(m, linear.columns, device="cuda", dtype=torch.bfloat16)
    cache = 4 * torch.cuda.get_device_properties("cuda").L2_cache_size
    weight = packed(linear, group_size)
    right = F.linear(x.float(), dequantized(weight, torch.float32))
    passes: dict[str, tuple[Callable[[], object], int]] = {}
    errors: dict[str, float] = {}
    for name, engine in engines.items():
        if name == "humming" and linear.bits != 2:
            continue
        products = [engine(weight)]
        errors[name] = float((products[0](x) - right).norm() / right.norm())
        if not errors[name] <= NEAR:
            raise SystemExit(f"{name}: {linear.name}, {m} tokens: {errors[name]:.2g} off the product, relative")
        size = 2 * linear.rows * linear.columns if name == "torch" else weight.packed_OB.numel()
        products += [engine(packed(linear, group_size)) for _ in range(cache // size)]
        passes[name] = (captured(products, x, eager), len(products))
    milliseconds: dict[str, list[float]] = {name: [] for name in passes}
    speeds: list[float] = []
    for repeat in range(repeats + 1):  # the first warms up
        speed = stream.speed()
        times = {name: timed(run) / number for name, (run, number) in passes.items()}
        if repeat:
            speeds.append(speed)
            for name, ms in times.items():
                milliseconds[name].append(ms)
    return Found(model, linear, m, weight.cuda_matrix().nbytes, milliseconds, speeds, errors)


def captured(products: Sequence[Product], x: Tensor, eager: bool) -> Callable[[], object]:
    """One pass through all copies, as a graph unless `eager`."""

    def run() -> None:
        for product in products:
            product(x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries tune, compile and allocate at their first calls
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    if eager:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(run: Callable[[], object]) -> float:
    """Milliseconds."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


class Stream:
    """The ruler: what torch reads of memory when it sums a gigabyte or copies one, whichever is faster."""

    def __init__(self) -> None:
        self.values = torch.zeros(2**28, device="cuda")
        self.copy = torch.empty_like(self.values)

    def speed(self) -> float:
        """GB/s."""
        size = self.values.numel() * self.values.element_size()
        return max(
            size / timed(lambda: self.values.sum()) / 1e6,
            2 * size / timed(lambda: self.copy.copy_(self.values)) / 1e6,
        )


# --- engines -------------------------------------------------------------------------------------------------------


def packed(linear: Linear, group_size: int) -> kernels.Weight:
    bytes_ = reference.row_bytes(linear.columns, linear.bits)
    codes = torch.randint(0, 256, (linear.rows, bytes_), dtype=torch.uint8, device="cuda")
    groups = 1 if group_size == -1 else linear.columns // group_size
    scale = (torch.rand(linear.rows, groups, device="cuda") * 0.02 + 0.001).half()
    return kernels.Weight(codes, scale, (2**linear.bits - 1) / 2, bits=linear.bits, in_features=linear.columns)


def dequantized(weight: kernels.Weight, dtype: torch.dtype) -> Tensor:
    bits, columns = weight.bits, weight.in_features
    return reference.dequantize(
        weight.packed_OB, weight.scale_OG, weight.zero, bits=bits, in_features=columns, dtype=dtype
    )


def upq(weight: kernels.Weight) -> Product:
    weight.cuda_matrix()
    return lambda x: kernels.linear(x, weight)


def dense(weight: kernels.Weight) -> Product:
    w_OI = dequantized(weight, torch.bfloat16)
    return lambda x: F.linear(x, w_OI)


def gemlite(weight: kernels.Weight) -> Product:
    from gemlite.helper import A16Wn_HQQ_INT

    codes_OI = reference.unpack(weight.packed_OB, weight.bits, weight.in_features)
    zeros_OG = torch.full_like(weight.scale_OG, weight.zero)
    helper = A16Wn_HQQ_INT(device=weight.packed_OB.device, dtype=torch.bfloat16, W_nbits=weight.bits)
    layer: Product = helper.from_weights(codes_OI, weight.scale_OG, zeros_OG)
    return layer


def humming(weight: kernels.Weight) -> Product:
    from humming.layer import HummingLayer

    rows, groups = weight.scale_OG.shape
    config: dict[str, Any] = {"dtype": "uint2", "has_zero_point": True, "is_fp_zero_point": True}
    config["group_size"] = weight.in_features // groups if groups > 1 else 0
    layer = HummingLayer(
        shape_n=rows, shape_k=weight.in_features, weight_config=config, torch_dtype=torch.bfloat16
    ).cuda()
    scale_OG = weight.scale_OG.bfloat16()
    layer.load_from_tensors(
        {
            "weight": weight.packed_OB.contiguous().view(torch.int32),
            "weight_scale": scale_OG,
            "zero_point": torch.full_like(scale_OG, weight.zero),
        }
    )
    layer.transform()
    product: Product = layer
    return product


if __name__ == "__main__":
    typer.run(main)

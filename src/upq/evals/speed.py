"""Decoding speed, and its share of the speed of memory: engines in turns, in one process.

A shared machine changes its speed from minute to minute. So every repeat runs all engines one after the other and reads
memory in between; ratios are taken within a repeat, and the figures are medians over the repeats.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from upq import decoding
from upq.core.errors import UPQError
from upq.core.memory import on_huge_pages
from upq.exports import export, exporter

Clock = Callable[[], float]
# (prompt, tokens, clock) → the clock before the call and after each token
Run = Callable[[list[int], int, Clock], list[float]]

_LEAST_READ = 256 << 20  # bytes: far more than caches hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Greedy decoding of `tokens` after a short `prompt`, and prompts of `prefill` tokens."""

    prompt: int = 16
    tokens: int = 64
    prefill: int = 128
    repeats: int = 5

    @property
    def positions(self) -> int:
        return max(self.prompt + self.tokens, self.prefill + 1)


@dataclass(frozen=True, slots=True)
class Engine:
    name: str
    run: Run
    weight_bytes: int | None = None  # weights that a token reads
    cache_bytes: int = 0  # keys and values of a position


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Medians; rates are tokens a second."""

    name: str
    decode: float
    prefill: float
    first_token: float  # seconds from the call to the first token, after a prompt of `Workload.prefill` tokens
    bytes_per_token: int | None  # weights, and keys and values at the middle of the text
    of_stream: float | None  # bytes per token · decode, over a plain read of memory
    decode_ratio: float  # the first engine's rate over this one's
    prefill_ratio: float


def measure(
    engines: Sequence[Engine], workload: Workload, vocabulary: int, *, clock: Clock = time.perf_counter
) -> tuple[list[Speed], float]:
    """Every engine's figures, and bytes a second of a plain read by as many threads as torch has."""
    prompt, longer = (_ids(n, vocabulary) for n in (workload.prompt, workload.prefill))
    held = {e.name: _bytes_per_token(e, workload) for e in engines}
    ruler = on_huge_pages(max(_LEAST_READ, *(n or 0 for n in held.values())))
    decode: dict[str, list[float]] = {e.name: [] for e in engines}
    first: dict[str, list[float]] = {e.name: [] for e in engines}
    reads: list[float] = []
    for repeat in range(workload.repeats + 1):
        if repeat:  # the first round warms up
            reads.append(ruler.nbytes / _seconds(ruler.sum, clock))
        for engine in engines:
            times = engine.run(prompt, workload.tokens, clock)
            until_first = engine.run(longer, 1, clock)
            if repeat:
                decode[engine.name].append((workload.tokens - 1) / (times[-1] - times[1]))
                first[engine.name].append(until_first[1] - until_first[0])
    best = engines[0].name
    speeds = [
        Speed(
            name=name,
            decode=statistics.median(rates),
            prefill=workload.prefill / statistics.median(first[name]),
            first_token=statistics.median(first[name]),
            bytes_per_token=held[name],
            of_stream=_median_ratio([rate * (held[name] or 0) for rate in rates], reads) if held[name] else None,
            decode_ratio=_median_ratio(decode[best], rates),
            prefill_ratio=_median_ratio(first[name], first[best]),
        )
        for name, rates in decode.items()
    ]
    return speeds, statistics.median(reads)


# --- engines -------------------------------------------------------------------------------------------------------


def compiled(model: Any) -> Engine:
    """`model.generate` of a model from `upq.load`. Raises UPQError where the compiled decoder does not take it."""
    try:
        parts = decoding.session(model).parts
    except decoding.Unsuitable as reason:
        raise UPQError(f"the compiled decoder does not run this model: {reason}") from None

    def run(ids: list[int], tokens: int, clock: Clock) -> list[float]:
        decoding.session(model).forget()
        times = _timed(model, model.generate, ids, tokens, clock)
        assert model.why_not_compiled is None  # the label must name what is timed
        return times

    return Engine("upq", run, parts.weight_bytes, parts.cache_bytes)


def decoder(model: Any) -> tuple[Engine, str | None]:
    """What `model.generate` of a loaded artefact runs: the compiled decoder, or transformers' loop and the reason."""
    if hasattr(model, "why_not_compiled"):  # an artefact
        try:
            decoding.session(model)
        except decoding.Unsuitable as reason:
            return plain("transformers", model), str(reason)
    return compiled(model), None


def plain(name: str, model: PreTrainedModel, weight_bytes: int | None = None) -> Engine:
    """transformers' own loop."""

    def generate(*args: Any, **options: Any) -> Any:
        unbound: Any = GenerationMixin.generate
        return unbound(model, *args, **options)

    return Engine(name, lambda ids, tokens, clock: _timed(model, generate, ids, tokens, clock), weight_bytes)


def check_llama_cpp() -> None:
    """Check that llama.cpp is installed. Raises UPQError."""
    exporter("gguf")
    try:
        import_module("llama_cpp")
    except ImportError:
        raise UPQError(
            "cannot compare with GGUF: llama-cpp-python is not installed; pip install llama-cpp-python"
        ) from None


def llama_cpp(
    artifact: Path, scratch: Path, *, threads: int, positions: int, options: Mapping[str, Any] | None = None
) -> Engine:
    """llama.cpp on the exact export of `artifact`, which is written into `scratch`; `options` of the format gguf."""
    check_llama_cpp()
    file = scratch / "model.gguf"
    export(artifact, "gguf", file, options=options)
    tensors = {t.name: int(t.n_bytes) for t in import_module("gguf").GGUFReader(file).tensors}
    read = sum(tensors.values())
    if "output.weight" in tensors:  # with a head of its own, a token reads one row of the embedding
        read -= tensors["token_embd.weight"]
    engine: Any = import_module("llama_cpp").Llama(
        model_path=str(file), n_ctx=positions, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run(ids: list[int], tokens: int, clock: Clock) -> list[float]:
        engine.reset()
        times = [clock()]
        for _, _ in zip(range(tokens), engine.generate(ids, temp=0.0), strict=False):
            times.append(clock())
        return times

    return Engine("llama.cpp", run, read)


class _Stopwatch(BaseStreamer):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None: ...


def _timed(model: PreTrainedModel, generate: Any, ids: list[int], tokens: int, clock: Clock) -> list[float]:
    watch, ids_1T = _Stopwatch(clock), torch.tensor([ids])
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # the text goes on after an end token
    began = clock()
    generate(ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=tokens, do_sample=False, streamer=watch)
    return [began, *watch.times[1:]]  # transformers shows a streamer the prompt first


# --- arithmetic ----------------------------------------------------------------------------------------------------


def _ids(count: int, vocabulary: int) -> list[int]:
    found: list[int] = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return found


def _bytes_per_token(engine: Engine, workload: Workload) -> int | None:
    if engine.weight_bytes is None:
        return None
    return engine.weight_bytes + engine.cache_bytes * (workload.prompt + workload.tokens // 2)


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    began = clock()
    run()
    return clock() - began


def _median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median of ratios, each within one repeat."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))

"""Many texts at a time: `python benchmarks/batches.py decode|conversations|answers|cache MODEL`.

The compiled decoder and transformers' loop over the same weights and kernels, in turns; ratios are within a repeat.
MODEL is an original or an artefact. With one thread the clock is the processor's.

decode         greedy tokens a second in batches of 1, 8 and 32, all prompts and answers of one length
conversations  tokens a second of finished conversations that an original writes, as a run does
answers        answers of 64 questions of mini_ifeval, as `upq eval` asks them
cache          KL of int8 keys and values against float32 ones, by position
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from transformers import GenerationMixin

import upq
from _table import Figure, Table, make_console, show_figures, write_figures
from upq import decoding, kernels
from upq.core.precision import to_compute_dtype
from upq.core.processes import ALONE
from upq.core.progress import Silent
from upq.data.config import Generated
from upq.data.generated import _conversations, _Sampler, _Stream
from upq.decoding._parts import parts as parts_of
from upq.evals import tasks
from upq.kernels import cpu
from upq.kernels.decoder import STORED, Decoder
from upq.model.loading import load_model, load_tokenizer
from upq.run.quiet import quiet_libraries
from upq.text.generation import Request, end_tokens

CONVERSATIONS, ANSWERS = 3, 5  # times transformers' loop, at least

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Model = Annotated[Path, typer.Argument()]
Threads = Annotated[int, typer.Option(min=1)]
Repeats = Annotated[int, typer.Option(min=1)]
Json = Annotated[Path | None, typer.Option("--json")]


@app.command()
def decode(
    model: Model,
    batches: Annotated[list[int], typer.Option("--batch", min=1)] = [1, 8, 32],  # noqa: B006
    prompt: int = 32,
    tokens: int = 64,
    compute: str = "w2a8",
    threads: Threads = 1,
    repeats: Repeats = 3,
    json_file: Json = None,
) -> None:
    """Tokens a second."""
    loaded, clock = _loaded(model), _prepare(threads)
    rows, figures = [], []
    with kernels.computing(compute):
        for size in batches:
            ids = _prompts(size, prompt, loaded.config.vocab_size)

            def ours(ids: list[list[int]] = ids, size: int = size) -> int:
                requests = (Request(i, tuple(each), tokens, lambda _: False) for i, each in enumerate(ids))
                texts = decoding.batch(loaded, size=size)
                return sum(len(text) for _, text in texts.write(requests))

            def theirs(ids: list[list[int]] = ids) -> int:
                plain: Any = GenerationMixin.generate
                found = plain(
                    loaded, torch.tensor(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
                )
                return found[:, prompt:].numel()

            speed = _in_turns({"upq": ours, "transformers": theirs}, clock, repeats, warm=size == batches[0])
            figures.append(Figure(f"batch of {size}, upq over transformers", speed["ratio"], "×", "none", True))
            rows.append((str(size), f"{speed['upq']:.1f}", f"{speed['transformers']:.1f}", f"{speed['ratio']:.2f} ×"))
    title = f"{model}: prompts of {prompt}, {tokens} tokens each, {compute}"
    _show(Table(title, ("batch", "upq, tokens/s", "transformers", "upq is"), tuple(rows)), json_file, figures)


@app.command()
def conversations(
    model: Model,
    batch_size: int = 128,
    max_new_tokens: int = 512,
    batches: Annotated[int, typer.Option(help="Of the compiled decoder; transformers writes the first.")] = 3,
    threads: Threads = 1,
    json_file: Json = None,
) -> None:
    """Tokens a second of finished conversations; the compiled decoder's include those of batches that it began."""
    clock, loaded, tokenizer = (
        _prepare(threads),
        load_model(str(model), dtype=torch.float32),
        load_tokenizer(str(model)),
    )
    section = Generated(tokens=1, batch_size=batch_size, max_new_tokens=max_new_tokens)
    ends = frozenset(end_tokens(loaded.generation_config, tokenizer))

    def size(talks: Any) -> int:
        said = [message["content"] for talk in talks for message in talk]
        return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said)

    began = clock()
    stream = _Stream(decoding.batch(loaded, size=batch_size), tokenizer, section, ends, 0, count())
    talks = [talk for number in range(batches) for talk in stream(number)]
    talks += [talk for each in stream._open.values() for talk in each.talks.values()]
    ours = size(talks) / (clock() - began)
    began = clock()
    sampler = _Sampler(loaded, tokenizer, max_new_tokens, ALONE)
    first = list(_conversations(sampler, tokenizer, section, 0, 0))
    theirs = size(first) / (clock() - began)
    ratio = ours / theirs
    figures = [
        Figure("conversations, upq", ours, "tokens/s", "none", True),
        Figure("conversations, upq over transformers", ratio, "×", f">= {CONVERSATIONS}", ratio >= CONVERSATIONS),
    ]
    row = (str(batch_size), f"{ours:.1f}", f"{theirs:.1f}", f"{ratio:.2f} ×")
    _show(Table(str(model), ("batch", "upq, tokens/s", "transformers", "upq is"), (row,)), json_file, figures)


@app.command()
def answers(
    model: Model,
    questions: int = 64,
    batch_size: int = 4,
    compute: str = "reference",
    threads: Threads = 1,
    json_file: Json = None,
) -> None:
    """Answers a second; the loop of before is lm-eval's over transformers', at the same `--batch-size`."""
    clock = _prepare(threads)
    speed, said = dict[str, float](), dict[str, dict[str, str]]()
    for name in ("upq", "transformers"):
        loaded = to_compute_dtype(load_model(str(model)))  # as `upq eval` has it
        with kernels.computing(compute), TemporaryDirectory() as folder:
            options = {"batch_size": batch_size, "progress": Silent()}
            kept, tokenizer = Path(folder) / "answers.jsonl", load_tokenizer(str(model))
            with patch.object(tasks, "batch", decoding.batch if name == "upq" else _unsuitable):
                tasks.evaluate_tasks(loaded, tokenizer, ["mini_ifeval"], limit=1, **options)  # imports, seconds
                began = clock()
                tasks.evaluate_tasks(loaded, tokenizer, ["mini_ifeval"], limit=questions, answers=kept, **options)
            speed[name] = questions / (clock() - began)
            lines = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
            said[name] = {line["key"]: line["answer"] for line in lines}
    same, ratio = (
        sum(said["upq"][key] == text for key, text in said["transformers"].items()),
        speed["upq"] / speed["transformers"],
    )
    figures = [
        Figure("answers, upq over lm-eval's loop", ratio, "×", f">= {ANSWERS}", ratio >= ANSWERS),
        Figure("answers that are the same", same, f"of {questions}", f"{questions}", same == questions),
    ]
    row = (compute, f"{speed['upq']:.2f}", f"{speed['transformers']:.2f}", f"{ratio:.2f} ×", str(same))
    head = ("products", "upq, answers/s", "lm-eval over transformers", "upq is", f"same of {questions}")
    _show(Table(f"{model}: --batch-size {batch_size}", head, (row,)), json_file, figures)


@app.command()
def cache(
    model: Model,
    text: Annotated[Path, typer.Argument(help="A text file.")],
    rows: int = 8,
    seq_len: int = 256,
    compute: str = "w2a16",
    threads: Threads = 1,
    json_file: Json = None,
) -> None:
    """KL(float32 ‖ int8) of the next token, at every eighth position."""
    _prepare(threads)
    loaded, tokenizer = _loaded(model), load_tokenizer(str(model))
    ids = tokenizer(text.read_text()[: rows * seq_len * 8], add_special_tokens=False)["input_ids"]
    parts = parts_of(loaded, dense=True)
    kl, top = [], []
    held = {stored: Decoder(parts, cache=stored) for stored in STORED}
    for row in range(min(rows, len(ids) // seq_len)):
        line = ids[row * seq_len : (row + 1) * seq_len]
        texts = {stored: decoder.open() for stored, decoder in held.items()}
        for at in range(0, seq_len, 8):
            exact, rounded = (
                decoder.forward({texts[stored]: line[at : at + 8]}, compute=compute)[0].log_softmax(-1)  # type: ignore[arg-type]
                for stored, decoder in held.items()
            )
            kl.append(float((exact.exp() * (exact - rounded)).sum()))
            top.append(float(exact.argmax() == rounded.argmax()))
        for stored, decoder in held.items():
            decoder.close(texts[stored])
    error = statistics.stdev(kl) / len(kl) ** 0.5
    mean, agreed = statistics.mean(kl), statistics.mean(top)
    figures = [
        Figure("KL of int8 keys and values", mean, "nats", "none", True),
        Figure("top-1 of int8 keys and values", agreed, "", "none", True),
        *(
            Figure(f"cache in {stored}", decoder.cached_bytes, "bytes", "none", True)
            for stored, decoder in held.items()
        ),
    ]
    row_of = (f"{mean:.2e} ± {error:.1e}", f"{agreed:.2%}", str(len(kl)))
    _show(Table(f"{model}: int8 keys and values", ("KL", "top-1", "positions"), (row_of,)), json_file, figures)


def _unsuitable(*_: Any, **__: Any) -> Any:
    raise decoding.Unsuitable("for comparison")


def _loaded(model: Path) -> Any:
    return upq.load(model) if (model / "upq.json").is_file() else load_model(str(model), dtype=torch.float32)


def _prepare(threads: int) -> Callable[[], float]:
    quiet_libraries()
    torch.set_num_threads(threads)
    return time.process_time if threads == 1 else time.perf_counter


def _prompts(size: int, length: int, vocabulary: int) -> list[list[int]]:
    drawn = random.Random(0)
    return [[drawn.randrange(vocabulary) for _ in range(length)] for _ in range(size)]


def _in_turns(
    runs: dict[str, Callable[[], int]], clock: Callable[[], float], repeats: int, *, warm: bool
) -> dict[str, float]:
    """Medians of tokens a second, and of the first over the second within a repeat."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + warm):
        for name, run in runs.items():
            began = clock()
            tokens = run()
            if repeat >= warm:
                found[name].append(tokens / (clock() - began))
    first, second = found.values()
    ratio = statistics.median(a / b for a, b in zip(first, second, strict=True))
    return {name: statistics.median(rates) for name, rates in found.items()} | {"ratio": ratio}


def _show(shown: Table, json_file: Path | None, figures: list[Figure]) -> None:
    console = make_console()
    shown.show(console)
    processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    console.print(f"{processor.partition(': ')[2]}, {cpu.instruction_set()}, load {os.getloadavg()[0]:.1f}")
    show_figures(figures, console)
    if json_file:
        write_figures(figures, json_file)


if __name__ == "__main__":
    app()

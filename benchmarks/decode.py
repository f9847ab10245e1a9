"""Decoding and prompts of a model of a billion random weights, engines in turns: `python benchmarks/decode.py`.

The shape is that of Llama-3.2-1B with a head of its own over 32,000 tokens; speed does not depend on the values of
weights. With --subject it is a real model, rounded to nearest. The artefact is made once in --dir (of a billion
weights: 4 GB of memory on the way) and used again.

    upq            `upq.load(DIR).generate`, the compiled decoder
    transformers   its own loop over the same kernels
    torch          dense bfloat16 in transformers' loop (--dense, 2.5 GB)
    llama.cpp      on the exact GGUF export (--against gguf; needs llama-cpp-python): Q2_K, or TQ2_0 with --grid q2_0
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import _plots
import upq
from _rows import FROM_FP, NO_TRAINING, load_recipe
from _subjects import SUBJECTS, Subject, named
from _table import Figure, Table, make_console, show_figures, write_figures
from upq.artifact.manifest import MANIFEST, Manifest, SourceModel
from upq.artifact.transformers import embedding_tables, write_artifact
from upq.core.levels import Uniform
from upq.core.memory import resident_bytes
from upq.core.scheme import QTensor, QuantScheme
from upq.data.config import TextSource
from upq.evals import speed as bench
from upq.evals.speed import Engine, Speed, Workload
from upq.grids import GRIDS
from upq.kernels import computing, cpu
from upq.nn.blocks import model_weights
from upq.run.quiet import quiet_libraries

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
TINY = LLAMA_1B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    dir_: Annotated[Path, typer.Option("--dir", help="Where the artefact is, or is made.")] = Path("runs/decode"),
    group_size: Annotated[int, typer.Option(help="-1: one scale a row.")] = -1,
    grid: Annotated[str, typer.Option(help="seq, or q2_0: what llama.cpp's TQ2_0 holds.")] = "seq",
    embeddings: Annotated[int, typer.Option(help="Bits of embedding and head: 4 or 8.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="With one, the clock is the processor's.")] = 1,
    compute: Annotated[str, typer.Option(help="w2a8 or w2a16.")] = "w2a8",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    prompt: Annotated[int, typer.Option(min=1)] = 16,
    tokens: Annotated[int, typer.Option(min=2)] = 64,
    prefill: Annotated[int, typer.Option(min=1)] = 128,
    dense: Annotated[bool, typer.Option(help="Dense bfloat16 as well.")] = False,
    against: Annotated[str | None, typer.Option(help="gguf: llama.cpp as well.")] = None,
    subject: Annotated[str | None, typer.Option(help=f"A real model: {', '.join(SUBJECTS)}.")] = None,
    tiny: Annotated[bool, typer.Option(help="A model of two small blocks, to see whether this works.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture of speed against bytes a token.")] = None,
) -> None:
    """Medians over the repeats, ratios within a repeat. UPQ_CPU_ISA chooses the instruction set."""
    torch.set_num_threads(threads)
    workload = Workload(prompt=prompt, tokens=tokens, prefill=prefill, repeats=repeats)
    artifact = (
        dir_
        / f"{subject or ('tiny' if tiny else '1b')}-g{group_size}-e{embeddings}{'' if grid == 'seq' else f'-{grid}'}"
    )
    if not (artifact / MANIFEST).is_file():
        # by a process of its own: the memory it leaves would be taken for the model's
        scheme = QuantScheme(bits=2, group_size=group_size, grid=grid)
        what = named(subject) if subject else TINY if tiny else LLAMA_1B
        writer = get_context("spawn").Process(
            target=write_subject if subject else write, args=(artifact, what, scheme, embeddings)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit(writer.exitcode)
    quiet_libraries()
    before = resident_bytes()
    model = upq.load(artifact)
    with computing(compute), TemporaryDirectory() as scratch:
        engines = [bench.compiled(model)]
        engines[0].run([0] * prefill, 2, time.perf_counter)
        resident = resident_bytes() - before
        engines += rivals(artifact, model, dense=dense)
        if against == "gguf":
            options = {"tq2_0": grid == "q2_0"}
            engines.append(
                bench.llama_cpp(artifact, Path(scratch), threads=threads, positions=workload.positions, options=options)
            )
        clock = time.process_time if threads == 1 else time.perf_counter
        speeds, read = bench.measure(engines, workload, model.config.vocab_size, clock=clock)
    file_bytes = sum(file.stat().st_size for file in artifact.glob("*.safetensors"))
    console = make_console()
    console.print(
        f"{artifact.name}: {compute} on {cpu.instruction_set()}, {threads} threads, medians of {repeats} repeats; "
        f"{tokens} tokens after {prompt}, prompts of {prefill}; a plain read of memory: {read / 1e9:.1f} GB/s; "
        f"weight files {file_bytes / 1e6:.0f} MB, the loaded model {resident / 1e6:.0f} MB",
        highlight=False,
    )
    table(speeds).show(console)
    figures = [*targets(speeds, threads), memory_target(resident, file_bytes)]
    show_figures([figure for figure in figures if figure.target], console)
    if plot is not None:
        _plots.decoding(speeds, read, plot)
    if json_file is not None:
        write_figures(figures, json_file)


def rivals(artifact: Path, model: PreTrainedModel, *, dense: bool) -> Iterator[Engine]:
    yield bench.plain("transformers", model)
    if dense:
        unpacked = upq.load(artifact, dequantize=True, dtype=torch.bfloat16)
        read = sum(p.nbytes for name, p in unpacked.named_parameters() if "embed_tokens" not in name)
        yield bench.plain("torch", unpacked, read)


def targets(speeds: list[Speed], threads: int) -> Iterator[Figure]:
    about = f"{threads} threads"
    for speed in speeds:
        for name, rate, ratio, least in (
            ("decode", speed.decode, speed.decode_ratio, 2.0 if threads == 1 else 0.0),
            ("prompt", speed.prefill, speed.prefill_ratio, 1.5),
        ):
            yield Figure(f"{about}, {speed.name}: {name}", rate, "tokens/s", "", ok=True)
            if speed.name == "llama.cpp" and least:
                yield Figure(f"{about}: {name} against llama.cpp", ratio, "×", f">= {least:g}", ratio >= least)


def memory_target(resident: int, file_bytes: int) -> Figure:
    most = 1.15 * file_bytes + 150e6
    return Figure("memory of the loaded model", resident / 1e6, "MB", f"<= {most / 1e6:.0f}", resident <= most)


def table(speeds: list[Speed]) -> Table:
    head = (
        "engine",
        "decode tokens/s",
        "upq is",
        "prefill tokens/s",
        "upq is",
        "first token ms",
        "MB a token",
        "of a read",
    )
    rows = [
        (
            s.name,
            f"{s.decode:.4g}",
            f"{s.decode_ratio:.2f} ×",
            f"{s.prefill:.4g}",
            f"{s.prefill_ratio:.2f} ×",
            f"{1000 * s.first_token:.4g}",
            "–" if s.bytes_per_token is None else f"{s.bytes_per_token / 1e6:.1f}",
            "–" if s.of_stream is None else f"{s.of_stream:.0%}",
        )
        for s in speeds
    ]
    return Table("", head, tuple(rows))


# --- the model -----------------------------------------------------------------------------------------------------


def write_subject(out: Path, subject: Subject, scheme: QuantScheme, embeddings: int) -> None:
    """An artefact of a real model, each weight rounded to nearest."""
    from upq.run.reporter import PlainLines
    from upq.run.run import quantize

    subject.install()
    settings = [f"int2.grid={scheme.grid}", f"int2.group_size={scheme.group_size}", f"embeddings.bits={embeddings}"]
    recipe = load_recipe("paper", [*subject.overrides, FROM_FP, NO_TRAINING, *settings])
    train, _ = subject.texts(out.parent / f"{subject.name}-text", tokens=0)
    data = recipe.data.model_copy(update={"sources": (TextSource(path=str(train)),)})
    quantize(
        subject.model, recipe.model_copy(update={"data": data}), out, progress=PlainLines(make_console(), every=60)
    )


def write(out: Path, shape: dict[str, Any], scheme: QuantScheme, embeddings: int) -> None:
    """An artefact of `shape` with random codes; nothing of the model is dense but its norms and, once, its tables."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            replace(model, name, torch.ones(parameter.shape, dtype=torch.bfloat16))
    for path in embedding_tables(model):
        weight = model.get_submodule(path).weight
        replace(model, f"{path}.weight", 0.02 * torch.randn(weight.shape, dtype=torch.bfloat16))
    qtensors = {path: codes(model.get_submodule(path), scheme) for path in model_weights(model)}
    out.mkdir(parents=True)
    manifest = Manifest(model=SourceModel(path="random", digest="0"))
    write_artifact(
        out, model, qtensors, manifest=manifest, tokenizer=tokenizer(shape["vocab_size"]),
        embeddings_bits=cast(Any, embeddings),
    )  # fmt: skip


def replace(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def codes(linear: nn.Module, scheme: QuantScheme) -> QTensor:
    rows, columns = cast(nn.Linear, linear).weight.shape
    groups = scheme.groups(columns)
    scale_OG = (0.03 / columns**0.5 * (1 + torch.rand(rows, groups))).half()
    codes_OI = torch.randint(scheme.levels, (rows, columns), dtype=torch.uint8)
    zero = GRIDS.get(scheme.grid).zero(scheme)
    assert zero is not None  # grids whose groups have zero points of their own have no place here
    return QTensor(codes_OI, scale_OG, Uniform(torch.full((rows, groups), zero)), scheme)


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Bytes, and as many pairs as are missing: llama.cpp wants a vocabulary of the model's size, and merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet][: size - len(alphabet) - 1]
    vocabulary = {word: i for i, word in enumerate([*alphabet, *(a + b for a, b in pairs), "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


if __name__ == "__main__":
    app()

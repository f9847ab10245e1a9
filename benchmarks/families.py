"""Decoding and prompts of small random models of many families: `python benchmarks/families.py [FAMILY …]`.

The compiled decoder and transformers' own loop over the same kernels, in turns; ratios are taken within a repeat.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM

import upq
from _table import Table, make_console
from upq.artifact.manifest import Manifest, SourceModel
from upq.artifact.transformers import write_artifact
from upq.core.levels import Uniform
from upq.core.scheme import QTensor, QuantScheme
from upq.evals import speed as bench
from upq.evals.speed import Speed, Workload
from upq.grids import GRIDS
from upq.kernels import computing, cpu
from upq.model.matrices import Matrix
from upq.nn.blocks import model_weights
from upq.run.quiet import quiet_libraries

# Blocks of 12 million weights.
SMALL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0156},
    "olmo2": {},
    "gemma3_text": {"sliding_window": 512, "query_pre_attn_scalar": 64},
    "qwen3_moe": {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 704},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    families: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(FAMILIES)}; default: all.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="With one, the clock is the processor's.")] = 1,
    compute: Annotated[str, typer.Option(help="w2a8 or w2a16.")] = "w2a8",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    prompt: Annotated[int, typer.Option(min=1)] = 16,
    tokens: Annotated[int, typer.Option(min=2)] = 32,
    prefill: Annotated[int, typer.Option(min=1)] = 128,
    tiny: Annotated[bool, typer.Option(help="Two small blocks, to see whether this works.")] = False,
) -> None:
    """Medians over the repeats. UPQ_CPU_ISA chooses the instruction set."""
    torch.set_num_threads(threads)
    quiet_libraries()
    workload = Workload(prompt=prompt, tokens=tokens, prefill=prefill, repeats=repeats)
    rows = []
    with computing(compute):
        for family in families or FAMILIES:
            loop, ours = _measure(family, workload, tiny=tiny)
            rows.append(
                (
                    family,
                    f"{ours.decode:.4g}",
                    f"{loop.decode:.4g}",
                    f"{loop.decode_ratio:.2f} ×",
                    f"{ours.prefill:.4g}",
                    f"{loop.prefill:.4g}",
                    f"{loop.prefill_ratio:.2f} ×",
                )
            )
    console = make_console()
    console.print(
        f"{compute} on {cpu.instruction_set()}, {threads} threads, medians of {repeats} repeats; {tokens} tokens after "
        f"{prompt}, prompts of {prefill}",
        highlight=False,
    )
    head = ("family", "decode tokens/s", "transformers", "upq is", "prefill tokens/s", "transformers", "upq is")
    Table("", head, tuple(rows)).show(console)


def _measure(family: str, workload: Workload, *, tiny: bool) -> tuple[Speed, Speed]:
    """Of transformers' loop, and of the compiled decoder."""
    with TemporaryDirectory() as scratch:
        artifact = Path(scratch) / family
        write(artifact, family, tiny=tiny)
        model = upq.load(artifact)
        engines = [bench.compiled(model), bench.plain("transformers", model)]
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        (ours, loop), _ = bench.measure(engines, workload, model.config.vocab_size, clock=clock)
    return loop, ours


def write(out: Path, family: str, *, tiny: bool) -> None:
    """An artefact with random codes; its head and embedding stay dense."""
    torch.manual_seed(0)
    shape = SMALL | FAMILIES[family]
    if tiny:
        shape |= {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32).eval()
    scheme = QuantScheme(bits=2)
    qtensors = {path: _codes(weight, scheme) for path, weight in model_weights(model).items()}
    write_artifact(out, model, qtensors, manifest=Manifest(model=SourceModel(path="random", digest="0")))


def _codes(weight: Any, scheme: QuantScheme) -> QTensor:
    assert isinstance(weight, Matrix)
    rows, columns = weight.shape
    scale_OG = (0.03 / columns**0.5 * (1 + torch.rand(rows, 1))).half()
    zero = GRIDS.get(scheme.grid).zero(scheme)
    assert zero is not None
    codes_OI = torch.randint(scheme.levels, (rows, columns), dtype=torch.uint8)
    return QTensor(codes_OI, scale_OG, Uniform(torch.full((rows, 1), zero)), scheme)


if __name__ == "__main__":
    app()

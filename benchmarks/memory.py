"""Peak memory of the INT4 stage of random models of any depth: `python benchmarks/memory.py`

The shape of a block is that of Llama 3.2 1B. Each depth runs in a process of its own, whose peak is its own. What the
stage holds is one block being solved and two streams of hidden states; neither depends on how many iterations a block
takes, so few are enough. The checkpoint takes 0.5 GB of disk and 0.12 GB for each of the most layers asked for.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from _alone import run_alone
from _table import Figure, Table, make_console, show_figures, write_figures

HIDDEN, VOCABULARY, LAYERS = 2048, 128_256, 16  # of the 1B
LARGEST = 6e9  # bytes of the 1B
SPREAD = 1.10  # the largest peak over the smallest

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    layers: Annotated[list[int], typer.Option(min=1, help="A depth; may be repeated.")] = [4, 8, 16, 32],  # noqa: B006
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows.")] = 128,
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens of a row.")] = 2048,
    iterations: Annotated[int, typer.Option(min=1, help="Of FlexRound, for each block.")] = 2,
    activations: Annotated[str, typer.Option(help="memory or disk.")] = "disk",
    hidden: Annotated[int, typer.Option(min=64, help="A multiple of 64; less for a try.")] = HIDDEN,
    vocabulary: Annotated[int, typer.Option(min=2, help="Tokens; fewer for a try.")] = VOCABULARY,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where the files go for the time being.")] = None,
) -> None:
    if activations not in ("memory", "disk"):
        raise typer.BadParameter(f"{activations!r} is neither memory nor disk", param_hint="--activations")
    console = make_console()
    rows, peaks = [], {}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        model = Path(folder) / "model"
        run_alone(__file__, "make", model, max(layers), hidden, vocabulary)
        for depth in layers:
            stage = Path(folder) / f"int4-{depth}"
            found = run_alone(__file__, "measure", model, depth, stage, samples, seq_len, iterations, activations)
            peaks[depth] = found["peak"]
            megabytes = (f"{found[key] / 1e6:,.0f}" for key in ("before", "peak"))
            rows.append((str(depth), *megabytes, f"{found['seconds'] / depth:.1f}"))
    head = ("layers", "before the stage, MB", "peak, MB", "seconds a block")
    title = f"INT4 stage, hidden size {hidden}, {samples} x {seq_len} tokens, activations: {activations}"
    Table(title, head, tuple(rows)).show(console)
    found = judge(peaks, is_1b=(hidden, vocabulary) == (HIDDEN, VOCABULARY))
    show_figures(found, console)
    if json_file is not None:
        write_figures(found, json_file)
    raise typer.Exit(not all(figure.ok for figure in found))


def judge(peaks: dict[int, int], *, is_1b: bool) -> list[Figure]:
    """From depth to bytes. A single depth says nothing of depth, and another shape nothing of the 1B."""
    figures = []
    if len(peaks) > 1:
        ratio = max(peaks.values()) / min(peaks.values())
        figures.append(Figure("largest peak over smallest", ratio, "", f"<= {SPREAD:.2f}", ratio <= SPREAD))
    if is_1b and LAYERS in peaks:
        gigabytes, most = peaks[LAYERS] / 1e9, LARGEST / 1e9
        figures.append(Figure("peak of the 1B", gigabytes, "GB", f"<= {most:.0f}", gigabytes <= most))
    return figures


def make(
    folder: Path, layers: int, hidden: int, vocabulary: int, seed: int = 0, *, mlp: int | None = None, tied: bool = True
) -> None:
    """A random Llama in bfloat16, four times as wide in its MLP or `mlp`: a shard for each block, one for the rest."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=mlp or 4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
        vocab_size=vocabulary,
        max_position_embeddings=131_072,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(seed)
    shards: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        shards.setdefault(f"model-{parts[2] if parts[1] == 'layers' else 'rest'}.safetensors", {})[name] = parameter
    weight_map = {}
    for file, parameters in shards.items():
        tensors = {}
        for name, parameter in parameters.items():
            made = torch.empty(parameter.shape, dtype=torch.bfloat16)
            tensors[name] = made.fill_(1) if parameter.dim() == 1 else made.normal_(std=0.02)
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure(model: Path, layers: int, out: Path, samples: int, seq_len: int, iterations: int, disk: bool) -> None:
    """The INT4 stage of the model's first `layers` blocks; answers with this process's peak."""
    import torch

    from upq.blockwise import METHODS, BlockStore, walk
    from upq.core.memory import peak_memory_bytes, resident_bytes
    from upq.core.progress import Silent
    from upq.core.scheme import QuantScheme
    from upq.model.activations import allocator
    from upq.model.source import Source

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    out.mkdir()
    generator = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(config["vocab_size"], (samples, seq_len), generator=generator)
    flexround = METHODS.get("flexround")
    before, began = resident_bytes(), time.monotonic()
    walk(
        Source(model),
        tokens_NT,
        flexround(flexround.Config(iterations=iterations)),
        BlockStore(out / "blocks", QuantScheme(bits=4), latents=False),
        given=None,
        seed=0,
        progress=Silent(),
        precision="auto",
        activations=allocator(out if disk else None),
    )
    print(json.dumps({"before": before, "peak": peak_memory_bytes(), "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), *map(int, sys.argv[3:]))
        print("{}")
    elif sys.argv[1:2] == ["measure"]:
        path, depth, out, *numbers, where = sys.argv[2:]
        measure(Path(path), int(depth), Path(out), *map(int, numbers), disk=where == "disk")
    else:
        app()

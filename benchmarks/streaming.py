"""Memory and speed of exports of a random model with the shape of Llama 3.2 1B: `python benchmarks/streaming.py`

Each export runs in a process of its own, whose peak memory is its own. Speed is of writing; reading back and comparing
comes on top and is shown beside it. The artefact takes 0.8 GB of disk, the largest export 4.9 GB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from _table import Figure, Table, make_console, show_figures, write_figures

ROOT = Path(__file__).resolve().parents[1]
FORMS = ("gguf", "compressed-tensors", "humming", "gptq", "onnx", "mlx", "torchao", "dense", "openvino")
HELD = ("openvino",)  # whose own writer wants the whole graph in memory: measured, without a target
LLAMA = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True,
}  # fmt: skip
SLOWEST = 100e6  # bytes a second
ROOM = 500e6  # bytes beside four times the largest tensor

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[str, typer.Option(help="Formats whose name contains this.")] = "",
    layers: Annotated[int, typer.Option(min=1, help="Blocks; fewer for a try.")] = LLAMA["num_hidden_layers"],
    vocabulary: Annotated[int, typer.Option(min=300, help="Tokens; fewer for a try.")] = LLAMA["vocab_size"],
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures with their targets.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where the files go for the time being.")] = None,
) -> None:
    console = make_console()
    rows: list[tuple[str, ...]] = []
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=work) as folder:
        artifact = Path(folder) / "artifact"
        largest = _alone("make", str(artifact), str(layers), str(vocabulary))["largest"]
        bound = 4 * largest + ROOM
        for form in FORMS:
            if only not in form:
                continue
            found = _alone("measure", str(artifact), form, str(Path(folder) / "out"))
            if "refusal" in found:
                console.print(f"{form}: {found['refusal']}", soft_wrap=True, highlight=False, markup=False)
                continue
            speed = found["bytes"] / found["write"]
            cells = (f"{found['bytes'] / 1e6:,.0f}", f"{found['peak'] / 1e6:,.0f}", f"{speed / 1e6:,.0f}")
            rows.append((form, *cells, f"{found['write']:.1f}", f"{found['check']:.1f}"))
            if form not in HELD:
                peak, most = found["peak"] / 1e6, bound / 1e6
                figures.append(Figure(f"{form}: peak memory", peak, "MB", f"<= {most:.0f}", peak <= most))
                figures.append(Figure(f"{form}: speed", speed / 1e6, "MB/s", ">= 100", speed >= SLOWEST))
    head = ("format", "MB written", "peak memory, MB", "MB/s", "write, s", "check, s")
    Table(f"random model, {layers} blocks, {vocabulary:,} tokens", head, tuple(rows)).show(console)
    show_figures(figures, console)
    if json_file is not None:
        write_figures(figures, json_file)
    raise typer.Exit(not all(figure.ok for figure in figures))


def _alone(*arguments: str) -> dict[str, Any]:
    """Run a command of this file in a new process; its last line of output is its answer."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def make(artifact: Path, layers: int, vocabulary: int) -> None:
    """An artefact of random codes; answers with the bytes of its largest tensor."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tiny import CHAT, byte_tokenizer
    from upq.artifact.manifest import Manifest, SourceModel
    from upq.artifact.transformers import write_artifact
    from upq.core.levels import Uniform
    from upq.core.scheme import QTensor, QuantScheme
    from upq.nn.blocks import model_weights

    config = AutoConfig.for_model("llama", **{**LLAMA, "num_hidden_layers": layers, "vocab_size": vocabulary})
    config.bos_token_id, config.eos_token_id = 256, 257
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    scheme, qtensors = QuantScheme(bits=2), {}
    for path in model_weights(model):
        rows, columns = model.get_submodule(path).weight.shape
        codes_OI = torch.randint(0, 4, (rows, columns), dtype=torch.uint8)
        scale_OG = (0.01 + 0.01 * torch.rand(rows, 1)).half()
        qtensors[path] = QTensor(codes_OI, scale_OG, Uniform(torch.full((rows, 1), 1.5)), scheme)
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT)
    artifact.mkdir(parents=True)
    manifest = Manifest(model=SourceModel(path="random/llama-1b", digest="0"))
    write_artifact(artifact, model, qtensors, manifest=manifest, tokenizer=tokenizer)
    print(json.dumps({"largest": 2 * vocabulary * LLAMA["hidden_size"]}))


def measure(artifact: Path, form: str, out: Path) -> None:
    """Export, and answer with bytes, seconds and the peak memory of this process."""
    import shutil

    from upq.core.errors import UPQError
    from upq.core.memory import peak_memory_bytes
    from upq.exports import EXPORTS, export

    target = out.with_name(f"{out.name}{EXPORTS.get(form.replace('-', '_')).suffix or ''}")
    try:
        report = export(artifact, form, target)
    except UPQError as error:
        print(json.dumps({"refusal": str(error)}))
        return
    print(json.dumps({"bytes": report.bytes, "peak": peak_memory_bytes(), **report.seconds}))
    shutil.rmtree(target) if target.is_dir() else target.unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["measure"]:
        measure(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        app()

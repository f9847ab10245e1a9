"""`upq bench`: the speed of an artefact on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upq.core.errors import UPQError
from upq.core.paths import local_or_hub
from upq.files.target import Target

if TYPE_CHECKING:
    from upq.evals.speed import Speed


def bench(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="An artefact: the --out of upq quantize, or a hub id.")
    ],
    against: Annotated[
        str | None, typer.Option(help="gguf: llama.cpp on the export of the same artefact, in turns with it.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens before the decoded ones.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 64,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that is timed.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Figures are medians over these.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as many as torch takes.")] = None,
    compute: Annotated[str, typer.Option(help="w2a8 (as in use) or w2a16.")] = "w2a8",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")] = None,
) -> None:
    """Measure decoding, prompts, memory, and the share of what a plain read of memory reaches in the same process."""
    if against not in (None, "gguf"):
        raise UPQError(f"--against must be gguf, got {against!r}")
    target = Target.of(json_file)
    artifact = local_or_hub(artifact)
    if compute not in ("w2a8", "w2a16"):
        raise UPQError(f"--compute must be w2a8 or w2a16, got {compute!r}")

    from upq.run.console import console, styled
    from upq.run.reporter import loading

    with loading():
        import torch

        from upq.artifact import transformers as hf
        from upq.artifact.size import weights_bytes
        from upq.core.memory import resident_bytes
        from upq.evals import speed as bench
        from upq.kernels import computing, cpu
        from upq.run.quiet import quiet_libraries

    quiet_libraries()
    if against:
        bench.check_llama_cpp()
    torch.set_num_threads(threads or torch.get_num_threads())
    workload = bench.Workload(prompt=prompt, tokens=tokens, prefill=prefill, repeats=repeats)
    status = console(stderr=True)
    with computing(compute), TemporaryDirectory() as scratch:
        before = resident_bytes()
        with status.status(styled(f"loading {artifact}")):
            model = hf.load(artifact)
            engine, reason = bench.decoder(model)
        engines = [engine]
        engines[0].run([0] * workload.prefill, 2, lambda: 0.0)
        resident = resident_bytes()
        if against:
            with status.status("exporting to GGUF"):
                engines.append(
                    bench.llama_cpp(
                        Path(artifact), Path(scratch), threads=torch.get_num_threads(), positions=workload.positions
                    )
                )
        with status.status("measuring"):
            speeds, read = bench.measure(engines, workload, model.config.get_text_config(decoder=True).vocab_size)
    figures: dict[str, Any] = {
        "decoder": engine.name,
        "why_not_compiled": reason,
        "compute": compute,
        "instruction_set": cpu.instruction_set(),
        "threads": torch.get_num_threads(),
        **dataclasses.asdict(workload),
        "file_bytes": weights_bytes(artifact),
        "resident_bytes": resident,
        "model_bytes": resident - before,
        "stream_bytes_per_second": read,
        "engines": [dataclasses.asdict(speed) for speed in speeds],
    }
    _show(figures, speeds)
    target.write(figures)


def _show(figures: dict[str, Any], speeds: list[Speed]) -> None:
    from upq.cli.console import size, table
    from upq.run.console import console

    shown = console()
    shown.print(
        f"{figures['compute']} on {figures['instruction_set']}, {figures['threads']} threads; medians of "
        f"{figures['repeats']}; a plain read of memory: {size(figures['stream_bytes_per_second'])}/s"
    )
    shown.print(
        "decoder: upq, compiled"
        if figures["why_not_compiled"] is None
        else f"decoder: transformers' loop with the packed kernels: {figures['why_not_compiled']}"
    )
    rows = [
        [
            f"decode, {figures['tokens']} tokens after {figures['prompt']}",
            *(f"{_rate(s.decode)} tokens/s" for s in speeds),
        ],
        [f"prompt of {figures['prefill']} tokens", *(f"{_rate(s.prefill)} tokens/s" for s in speeds)],
        ["its first token after", *(f"{1000 * s.first_token:.4g} ms" for s in speeds)],
        ["read for a token", *("–" if s.bytes_per_token is None else size(s.bytes_per_token) for s in speeds)],
        ["of a plain read", *("–" if s.of_stream is None else f"{s.of_stream:.0%}" for s in speeds)],
    ]
    if len(speeds) > 1:
        name = speeds[0].name
        rows.append([f"{name} decodes", *(f"{s.decode_ratio:.2f} ×" for s in speeds)])
        rows.append([f"{name} reads prompts", *(f"{s.prefill_ratio:.2f} ×" for s in speeds)])
    shown.print(table("", ["", *(s.name for s in speeds)], rows))
    shown.print(
        f"weight files {size(figures['file_bytes'])}; in memory the model takes {size(figures['model_bytes'])}, "
        f"the whole process {size(figures['resident_bytes'])}"
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

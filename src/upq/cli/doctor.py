"""`upq doctor`: parts of this machine that are there or missing, each with a remedy."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from upq.core.errors import UPQError
from upq.core.paths import local

CORE = ("torch", "transformers", "safetensors", "accelerate", "datasets", "pydantic", "typer", "rich")
# By extra: what needs it, and the modules that it brings.
EXTRAS = {
    "eval": ("upq eval --tasks, upq demo", ("lm_eval", "langdetect", "immutabledict", "nltk")),
    "report": ("upq report, upq compare, upq demo", ("jinja2", "vl_convert", "scipy")),
    "export": (
        "upq export",
        ("compressed_tensors", "gguf", "onnx", "onnxruntime", "openvino", "openvino_tokenizers", "torchao"),
    ),
    "phones": (
        "upq export --to mnn, coreml, executorch, litert",
        ("MNN", "coremltools", "executorch", "ai_edge_litert", "litert_lm_builder"),
    ),
    "serve": ("upq serve --engine transformers", ("fastapi", "uvicorn", "openai")),
    "train": ("distill.optimizer=adamw8bit", ("torchao",)),
    "dev": ("tests", ("pytest", "hypothesis", "ruff", "mypy")),
}
WITH_GPU = {"cuda": ("products on a GPU", ("gemlite",))}
ENOUGH_DISK = 5e9  # bytes; a 1B model's run needs about that


def doctor(
    artifact: Annotated[
        Path | None, typer.Argument(metavar="ARTIFACT", help="Check this artefact's files instead of the machine.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Exit with code 2 if anything is missing, extras included.")] = False,
) -> None:
    """Show versions, cores, memory, accelerator and optional parts, each with a remedy where it is missing.

    With an artefact: compare every file with the SHA-256 in its manifest.
    """
    from upq.run.reporter import loading

    if artifact is not None:
        with loading():
            from upq.artifact.manifest import read_manifest, verify

        artifact = local(artifact)
        manifest = read_manifest(artifact)
        verify(artifact, manifest)
        print(f"{artifact}: all {len(manifest.files)} files are as they were written")
        return
    import os
    import platform
    import shutil

    from rich.table import Table

    from upq.cli.console import size
    from upq.run.console import console, styled

    with loading("auto", "torch"):
        import torch

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    missing: list[str] = []

    def row(name: str, value: str, remedy: str = "") -> None:
        mark = ("!", "yellow") if remedy else ("✓", "green")
        table.add_row(styled(mark), name, styled(value, (f"  → {remedy}" if remedy else "", "yellow")))
        if remedy:
            missing.append(name)

    row("upq", _version("upq") or "?")
    row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in CORE:
        found = _version(package)
        row(package, found or "not installed", "" if found else f"pip install {package}")
    row("cores", f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads")
    row("instructions", torch.backends.cpu.get_cpu_capability())
    row("kernels", *_kernels("cpu"))
    total, free = _memory()
    row("memory", f"{size(total)}, {size(free)} free")
    disk = shutil.disk_usage(".").free
    row("disk here", f"{size(disk)} free", "" if disk > ENOUGH_DISK else "free some space, or --out elsewhere")
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        row("GPU", f"{gpu.name}, {size(gpu.total_memory)}")
        row("kernels on it", *_kernels("cuda"))
    else:
        row("GPU", "none; everything runs on the CPU")
    for extra, (what, modules) in (EXTRAS | (WITH_GPU if torch.cuda.is_available() else {})).items():
        absent = [name for name in modules if find_spec(name) is None]
        remedy = f"pip install 'upq[{extra}]'" if absent else ""
        row(f"extra {extra}: {what}", "missing: " + ", ".join(absent) if absent else "installed", remedy)
    console().print(table)
    if strict and missing:
        raise UPQError(f"missing on this machine: {', '.join(missing)}; the table above says how to get each")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _kernels(device: str) -> tuple[str, str]:
    """What products with packed weights run through on this type of device, and the remedy where they cannot."""
    from upq.kernels import compute, cpu, cuda

    try:
        chosen = compute(device)
        if chosen == "reference":
            return chosen, ""
        by = f"on {cpu.instruction_set()}" if device == "cpu" else f"by gemlite {cuda.library().__version__}"
        return f"{chosen} {by}", ""
    except UPQError as error:
        return "not usable", str(error)


def _memory() -> tuple[int, int]:
    """Total and available bytes."""
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available

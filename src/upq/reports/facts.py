"""Everything that the directory of a run or of an artefact says about it, as JSON types. Nothing is computed anew."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from upq.artifact.manifest import MANIFEST, Manifest, read_manifest
from upq.core.bounded import read_json
from upq.core.errors import UPQError
from upq.exports import EXPORTS
from upq.files.metrics import METRICS, read_metrics
from upq.files.tensors import load_metadata
from upq.kernels import cpu
from upq.run.directory import Record, read_record

Facts = dict[str, Any]

# What `upq eval --json` is asked to write, for the artefact and for the original.
EVALS = {"artifact": "eval.json", "source": "eval-original.json"}
_PACKAGES = ("upq", "torch", "transformers", "accelerate", "safetensors", "lm_eval")
_BLOCK = re.compile(r"^(?P<before>.*?)\.(?P<block>\d+)\.(?P<linear>.+)$")


def facts(directory: Path) -> Facts:
    """Of a finished artefact, or of a run under way or interrupted. Raises UPQError for what is neither."""
    record = read_record(directory)
    if (directory / MANIFEST).is_file():
        manifest = read_manifest(directory)
        found = _finished(directory, manifest)
    elif record is not None:
        found = _under_way(directory, record)
    else:
        raise UPQError(f"{directory}: no artefact and no run of upq is here; name the --out of upq quantize")
    return {
        "directory": str(directory),
        **found,
        "environment": _environment(),
        "engines": engines(),
        "speed": None,
        "texts": [],
        "prompts": [],
    }


def _finished(directory: Path, manifest: Manifest) -> Facts:
    lines = read_metrics(directory / METRICS)
    models = manifest.figures()
    for name, file in EVALS.items():
        if (directory / file).is_file():
            figures = read_json(directory / file, remedy="write it anew with upq eval --json")
            if not isinstance(figures, dict):
                raise UPQError(f"{directory / file}: no figures of upq eval; write it anew with upq eval --json")
            # The check's own text stays the text of the row.
            models[name] = {**figures, **models.get(name, {})}
    clocks = {line["stage"]: line for line in _of("stage", lines)}
    return {
        "name": manifest.model.name,
        "state": "finished",
        "original": manifest.model.path,
        "packed_weights": manifest.weights,
        "coverage": manifest.coverage,
        "peak_memory_bytes": manifest.peak_memory_bytes,
        "models": models,
        "layers": [
            _layer(layer.name, layer.error, layer.bits, layer.bits_per_weight, layer.weights)
            for layer in manifest.layers
        ],
        **_lines(lines),
        "stages": [
            {"stage": name, "seconds": seconds, "peak_memory_bytes": clocks.get(name, {}).get("peak_memory_bytes")}
            for name, seconds in manifest.seconds.items()
        ],
        "skipped_steps": manifest.skipped_steps,
        "answers": manifest.answers,
        "massive": {str(block): found for block, found in manifest.massive.items()},
        "recipe": _yaml(manifest.recipe),
        "data": manifest.data,
        "made_with": manifest.versions,
        "digests": {
            "original": manifest.model.digest,
            **{name: entry.sha256 for name, entry in sorted(manifest.files.items())},
        },
    }


def _under_way(directory: Path, record: Record) -> Facts:
    """Of what the stages have left so far: the layers as the last block-wise stage that is there has solved them."""
    folders = {name: record.folder(directory, name) for name in record.stages()}
    lines = [line for folder in folders.values() for line in read_metrics(folder / METRICS)]
    layers: list[Facts] = []
    for name, folder in folders.items():
        solved = list(_solved(name, folder))
        layers = solved or layers
    begun = [name for name, folder in folders.items() if (folder / "stage.json").is_file()]
    return {
        "name": Path(str(directory)).resolve().name,
        "state": f"not finished; the last stage that was begun is {begun[-1]}" if begun else "not finished",
        "original": None,
        "packed_weights": None,
        "coverage": "",
        "peak_memory_bytes": max(record.peak_memory_bytes.values(), default=None),
        "models": {},
        "layers": layers,
        **_lines(lines),
        "stages": [
            {"stage": name, "seconds": seconds, "peak_memory_bytes": record.peak_memory_bytes.get(name)}
            for name, seconds in record.seconds.items()
        ],
        "skipped_steps": [],
        "answers": {},
        "massive": {},
        "recipe": _yaml(record.recipe),
        "data": [{"path": source} for source in record.sources],
        "made_with": {},
        "digests": {"original": record.model, **record.files},
    }


def _solved(stage: str, folder: Path) -> Iterator[Facts]:
    for path in sorted(folder.glob("block-*.safetensors")):
        report = load_metadata(path).get("report", {})
        for linear, figures in report.items():
            yield _layer(f"{stage}.{int(path.stem.removeprefix('block-'))}.{linear}", figures.get("weight"))


def _lines(lines: list[dict[str, Any]]) -> Facts:
    return {f"{kind}s": _of(kind, lines) for kind in ("block", "step", "position")}


def _of(kind: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "kind"} for line in lines if line.get("kind") == kind]


def _layer(
    name: str,
    error: float | None,
    bits: int | None = None,
    bits_per_weight: float | None = None,
    weights: int | None = None,
) -> Facts:
    """With its place in the picture; a tensor of no block has none."""
    place = _BLOCK.match(name)
    return {
        "name": name,
        "block": int(place["block"]) if place else None,
        "linear": place["linear"] if place else name,
        "error": error,
        "bits": bits,
        "bits_per_weight": bits_per_weight,
        "weights": weights,
    }


def _yaml(recipe: dict[str, Any]) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else ""


def _environment() -> Facts:
    """Of the machine that makes the report."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "instruction_set": cpu.instruction_set(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": {"python": platform.python_version(), **{p: found for p in _PACKAGES if (found := _version(p))}},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# By format of `upq export`: where it runs, and the command that runs it there (docs/engines.md).
_RUNS = {
    "gguf": ("llama.cpp, Ollama, LM Studio", "llama-cli --model {out}.gguf --conversation"),
    "compressed_tensors": ("transformers without UPQ, vLLM, SGLang", "vllm serve {out}"),
    "humming": ("vLLM and SGLang on CUDA GPUs, 2 bits", "vllm serve {out}"),
    "onnx": ("ONNX Runtime, onnxruntime-genai", "python: onnxruntime_genai.Model('{out}')"),
    "openvino": ("OpenVINO, openvino-genai", "python: openvino_genai.LLMPipeline('{out}', 'CPU')"),
    "mnn": ("MNN on phones and processors", "python: MNN.llm.create('{out}/config.json')"),
    "coreml": ("iPhones and Macs (not run on a device)", "Xcode: {out}/model.mlpackage"),
    "executorch": ("ExecuTorch on phones and processors (XNNPACK)", "python: TextLLMRunner('{out}/model.pte', …)"),
    "litert": ("LiteRT-LM on phones and processors", "python: litert_lm.Engine('{out}/model.litertlm')"),
    "mlx": ("mlx-lm on Macs", "mlx_lm.chat --model {out}"),
    "torchao": ("torchao, ExecuTorch", "upq chat {out}"),
    "gptq": ("GPTQModel, AutoRound, vLLM", "vllm serve {out}"),
    "aqlm": ("transformers with aqlm", "python: AutoModelForCausalLM.from_pretrained('{out}')"),
    "dense": ("everything else", "upq chat {out}"),
}


def engines() -> list[Facts]:
    """Every format of `upq export`, those of others' packages too: what runs it, and the two commands."""
    found = []
    for name in EXPORTS.names():
        word, (runs, command) = name.replace("_", "-"), _RUNS.get(name, ("", ""))
        out = f"model-{word}"
        target = f"{out}.gguf" if name == "gguf" else out
        found.append(
            {
                "format": word,
                "runs_in": runs,
                "export": f"upq export DIR --to {word} --out {target}",
                "run": command.format(out=out),
            }
        )
    return found

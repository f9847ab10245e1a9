"""What all adapters share. Runs in a peer's own environment, which has torch, transformers and safetensors but no upq.

An adapter (`with_<peer>.py`) is started with one argument, the directory of its row, which holds `job.json`:

    model        Hugging Face directory of the original
    text         the calibration text
    tokens       the same text as a safetensors file: `tokens_NT`, int64, rows of `seq_len`
    seq_len      tokens of a row
    group_size   input features that share a scale; -1 is one scale for a whole row
    variant      which of the peer's algorithms, where it has several; else empty

and leaves there:

    stored/      the checkpoint as the peer itself writes it
    dense/       the same weights as a plain float32 checkpoint, dequantised by the peer's own code
    made.json    what was done (`Made`), or the peer's error in one line
"""

from __future__ import annotations

import json
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

BITS = 2


@dataclass(frozen=True)
class Job:
    folder: Path
    model: Path
    text: Path
    tokens: Path
    seq_len: int
    group_size: int
    variant: str = ""
    budget: int | None = None  # training tokens of UPQ; None: its recipe's

    @classmethod
    def read(cls, folder: Path) -> Job:
        raw = json.loads((folder / "job.json").read_text())
        paths = {name: Path(raw.pop(name)) for name in ("model", "text", "tokens")}
        return cls(folder, **paths, **raw)

    @property
    def stored(self) -> Path:
        return self.folder / "stored"

    @property
    def dense(self) -> Path:
        return self.folder / "dense"

    def calibration(self, most: int) -> Tensor:
        """The first `most` rows (N, T) of the calibration text, fewer if there are not as many."""
        return load_file(self.tokens)["tokens_NT"][:most]


@dataclass(frozen=True)
class Made:
    """One row before it is judged; everything but `version` is None where the peer failed, and `error` says why."""

    version: str
    error: str | None = None
    settings: str | None = None
    seconds: float | None = None  # from the model's directory to the peer's checkpoint on disk, imports excluded
    cpu_seconds: float | None = None  # of all threads in that time
    peak_memory_bytes: int | None = None  # resident, of the whole process: Python, torch and the peer included
    linears: int | None = None  # in the decoder blocks
    quantised: tuple[str, ...] | None = None  # those that have at most 4 levels a group
    kept: tuple[str, ...] | None = None  # those that are the original, up to the precision they are stored in
    bits_per_weight: float | None = None  # bytes of the block linears in stored/ · 8 / weights


def run(
    distribution: str,
    quantise: Callable[[Job], str],
    load: Callable[[Job], nn.Module],
    groups: Callable[[Job, Tensor], Tensor] = lambda job, weight_OI: weight_OI,
) -> None:
    """`quantise` fills stored/ and returns its settings in words; `load` reads stored/ as the peer's users do.

    `groups` arranges a weight (O, I) so that every group lies within a row, for a peer whose groups do not.
    """
    job = Job.read(Path(sys.argv[1]))
    made = Made(version=f"{distribution} {version(distribution)}")
    stage = ""
    try:
        wall, cpu = time.monotonic(), time.process_time()
        settings = quantise(job)
        seconds = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
        made = replace(made, settings=settings, peak_memory_bytes=peak_memory(), **seconds)
        stage = "after quantising: "
        made = replace(made, **export(job, load(job), groups))
    except Exception as error:  # whatever a peer stumbles over is its result
        traceback.print_exc()
        made = replace(made, error=stage + one_line(error))
    (job.folder / "made.json").write_text(json.dumps(asdict(made), indent=1))


def export(job: Job, made: nn.Module, groups: Callable[[Job, Tensor], Tensor]) -> dict[str, Any]:
    """Write dense/ and say which linears hold a 2-bit weight and in how many bits they are stored."""
    model = load_original(job)
    linears = model_weights(model)
    dtype = next(p.dtype for p in made.parameters() if p.is_floating_point())
    quantised, kept = [], []
    for path, linear in linears.items():
        weight_OI = weight_in_use(made.get_submodule(path), linear.in_features, dtype)
        if torch.allclose(weight_OI, linear.weight, rtol=2**-7, atol=1e-6):
            kept.append(path)
        elif has_few_levels(groups(job, weight_OI), job.group_size):
            quantised.append(path)
        linear.weight.data = weight_OI
    state = made.state_dict()
    for name, parameter in model.named_parameters():  # embeddings and norms, in the precision the peer gives them
        if name in state and name.removesuffix(".weight") not in linears:
            parameter.data = state[name].float()
    model.save_pretrained(job.dense)
    AutoTokenizer.from_pretrained(job.model).save_pretrained(job.dense)
    stored = stored_bytes(job.stored, list(linears))
    return {
        "linears": len(linears),
        "quantised": tuple(quantised),
        "kept": tuple(kept),
        "bits_per_weight": 8 * stored / sum(linear.weight.numel() for linear in linears.values()),
    }


@torch.inference_mode()
def weight_in_use(linear: nn.Module, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) that the peer's own forward pass multiplies with: its output for the identity matrix.

    Exact: every output is one weight times 1 plus zeros. Float32 holds what was computed in `dtype`.
    """
    linear.bias = None  # a bias is never quantised: dense/ has the original's
    return linear(torch.eye(in_features, dtype=dtype)).T.float().contiguous().clone()


def has_few_levels(weight_OI: Tensor, group_size: int) -> bool:
    """At most 4 levels a group, whichever columns of a row make up a group (activation order permutes them)."""
    groups = 1 if group_size == -1 else -(-weight_OI.shape[1] // group_size)
    return all(row.unique().numel() <= 2**BITS * groups for row in weight_OI)


def model_weights(model: PreTrainedModel) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def load_original(job: Job) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()


def stored_bytes(folder: Path, linears: list[str]) -> int:
    """Bytes of everything stored for these linears: codes, scales, zero points, orders, or a dense weight."""
    sizes = dict.fromkeys(linears, 0)
    for name, size in stored_tensors(folder):
        path = next((path for path in linears if name.startswith(f"{path}.")), None)
        if path is not None:
            sizes[path] += size
    if empty := [path for path, size in sizes.items() if size == 0]:
        raise RuntimeError(f"{folder}: nothing is stored for {empty[0]}")
    return sum(sizes.values())


def stored_tensors(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and bytes of the tensors in a checkpoint: safetensors, or what torch.save wrote."""
    for file in sorted(folder.rglob("*.safetensors")):
        yield from tensor_bytes("", load_file(file))
    for file in sorted(folder.rglob("*.pt")):
        yield from tensor_bytes("", torch.load(file, map_location="cpu", weights_only=True))


def tensor_bytes(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """Nested dictionaries and tensor subclasses by their parts; what is no tensor is not counted."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from tensor_bytes(f"{name}.{key}".lstrip("."), inner)
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for part in value.__tensor_flatten__()[0]:
            yield from tensor_bytes(f"{name}.{part}", getattr(value, part))
    elif isinstance(value, Tensor):
        yield name, value.numel() * value.element_size()


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux' VmHWM: a process starts out with the ru_maxrss of the one that started it (here 693 MB instead of 374 MB).
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}".rstrip(": ")[:400]

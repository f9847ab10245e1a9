"""Writes a transformed model as a Hugging Face directory of its own, one block in memory at a time."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upq.core.bounded import read_json
from upq.core.memory import trim
from upq.core.precision import dtype_name
from upq.core.progress import Progress
from upq.files.atomic import atomic_write, written
from upq.files.tensors import INDEX, save_tensors, tensor_shapes
from upq.model.activations import Allocate, batches, in_memory
from upq.model.online import KEY
from upq.model.source import Source
from upq.model.walker import Replay, Step, hidden_states, walk
from upq.transforms._base import Run, Transform

_OTHERS = ("generation_config.json", "*processor_config.json", "*.jinja", "*token*", "merges.txt", "vocab.*")
_CHOICE = "choice.json"  # what a transform has decided before it changed anything
_BESIDE = "beside.safetensors"  # all tensors that are in no decoder block


def write_transformed(
    source: Source,
    transform: Transform,
    folder: Path,
    progress: Progress,
    *,
    rows_NT: Tensor | None = None,
    allocate: Allocate = in_memory,
) -> None:
    """`source` in float32 with its weights changed, in `folder`. Blocks that an earlier call has written are kept.

    `rows_NT`: what a transform that `needs_inputs` calibrates on. The configuration keeps the original's type, so what
    is read from the folder as a model is in that type.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replay, places = Replay(source), dict[str, str]()
    files = [folder / f"block-{index:04}.safetensors" for index in range(len(source))]
    assert rows_NT is not None or not transform.needs_inputs
    tokens_NT = torch.zeros(0, 0, dtype=torch.long) if rows_NT is None else rows_NT
    choice = folder / _CHOICE
    if not choice.is_file():
        streams = int(transform.needs_inputs)
        found = transform.choose(source, walk(source, tokens_NT, streams=streams, allocate=allocate, replay=replay))
        atomic_write(choice, json.dumps(found, indent=2) + "\n")
    if (chosen := read_json(choice, remedy="delete its folder")) is not None:
        transform = transform.settled(chosen)
    streams = int(transform.needs_inputs and not all(file.is_file() for file in files))
    for step, file in zip(
        walk(source, tokens_NT, streams=streams, allocate=allocate, replay=replay), files, strict=True
    ):
        index = step.index
        if not file.is_file():
            block = source.block(index)
            transform.block(index, block, source, _run(replay, index), partial(_over_rows, step))
            save_tensors(file, {source.path_of(index, name): tensor for name, tensor in block.state_dict().items()})
            del block
            trim()
        if streams:
            step.advance(source.block(index))
        places |= dict.fromkeys(tensor_shapes(file), file.name)
        progress.advance(1)
    if not (folder / _BESIDE).is_file():
        save_tensors(folder / _BESIDE, _beside(source, transform))
    places |= dict.fromkeys(tensor_shapes(folder / _BESIDE), _BESIDE)
    for file in (file for pattern in _OTHERS for file in source.path.glob(pattern) if file.is_file()):
        with written(folder / file.name) as scratch:
            shutil.copyfile(file, scratch)
    atomic_write(folder / "config.json", json.dumps(_config(source, transform), indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    atomic_write(folder / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2) + "\n")


@torch.no_grad()
def _over_rows(step: Step, block: nn.Module) -> None:
    for rows in batches(len(step.states[0]), step.batch_size):
        step.run(block, rows)


def _run(replay: Replay, index: int) -> Run:
    def run(block: nn.Module, hidden_BTH: Tensor) -> Tensor:
        ids_BT = torch.arange(hidden_BTH.shape[1])[None].expand(len(hidden_BTH), -1)
        call = replay.call(index, ids_BT)
        return hidden_states(block(hidden_BTH, *call.args, **call.kwargs))

    return run


def _beside(source: Source, transform: Transform) -> dict[str, Tensor]:
    """All tensors but those of decoder blocks; towers for images and sound as they are."""
    model, blocks = source.without_blocks(), f"{source.layout.blocks}."
    transform.frame(model, source)
    tied = {} if transform.unties(source) else model.all_tied_weights_keys
    return {
        name: source.tensor(name) if tensor.is_meta else tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(blocks) and name not in tied
    }


def _config(source: Source, transform: Transform) -> dict[str, Any]:
    raw: dict[str, Any] = read_json(source.path / "config.json", remedy="is it a model?")
    raw.pop("torch_dtype", None)
    raw["dtype"] = dtype_name(Source(source.path, dtype="auto").dtype)
    if rotations := transform.online(source):
        named = {path: rotation.model_dump(exclude_none=True) for path, rotation in rotations.items()}
        raw[KEY] = raw.get(KEY, {}) | named
    if transform.unties(source):
        raw["tie_word_embeddings"] = False
        for part in raw.values():  # of a model for images, the language model's own configuration
            if isinstance(part, dict) and part.get("tie_word_embeddings"):
                part["tie_word_embeddings"] = False
    return raw

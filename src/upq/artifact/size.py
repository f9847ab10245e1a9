"""Size of a model: bits a weight of the decoder's linears, and bytes of the weight files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from upq.core.errors import UPQError
from upq.files.tensors import INDEX, WEIGHTS, shard_names
from upq.model.loading import family
from upq.nn.packed import PackedLinear
from upq.nn.trained import TrainedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """`bits_per_weight` is the mean over the weights of the decoder blocks' linears, scales included, biases not."""

    bits_per_weight: float
    weights: int  # how many those are


def model_size(model: PreTrainedModel) -> ModelSize:
    """Counts stored bits: dtype of a dense linear, codes and scales of a packed or a fake-quantised one."""
    spec = family(model.config)
    blocks = model.get_submodule(spec.blocks)
    assert isinstance(blocks, nn.ModuleList)
    sizes = [_linear_bits(block.get_submodule(name)) for block in blocks for name in spec.linears]
    weights = sum(size[0] for size in sizes)
    bits = sum(size[1] for size in sizes)
    return ModelSize(bits_per_weight=bits / weights, weights=weights)


def weights_bytes(model: str | Path) -> int:
    """Size of the weight files of a directory, or of a hub id that has been loaded before (nothing is downloaded)."""
    directory = Path(model)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            directory = Path(snapshot_download(str(model), local_files_only=True, allow_patterns=patterns))
        except LocalEntryNotFoundError:
            raise UPQError(f"{model}: not a directory and not in the hub's local cache; load the model first") from None
    # Only files that are loaded count: hub repositories often hold the same weights a second time, in another form.
    if (directory / WEIGHTS).is_file():
        files = [directory / WEIGHTS]
    elif (directory / INDEX).is_file():
        files = [directory / name for name in shard_names(directory / INDEX)]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files or not all(file.is_file() for file in files):
        raise UPQError(f"{directory}: weight files (*.safetensors) are missing; is it a complete model?")
    return sum(file.stat().st_size for file in files)


def _linear_bits(linear: nn.Module) -> tuple[int, float]:
    """Weights of a linear and the bits they are stored in."""
    if isinstance(linear, TrainedLinear):
        with torch.no_grad():
            return _linear_bits(PackedLinear.from_qtensor(linear.freeze()))  # as it will be stored
    if isinstance(linear, PackedLinear):
        # codes, scales and, where groups have their own, zero points: the state is the file layout
        stored = [buffer for name, buffer in linear.named_buffers() if name.startswith("weight_")]
        bits = sum(buffer.numel() * buffer.element_size() * 8 for buffer in stored)
        return linear.in_features * linear.out_features, bits
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.numel(), weight.numel() * weight.element_size() * 8

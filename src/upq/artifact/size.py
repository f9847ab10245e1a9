"""Size of a model: bits a weight of the decoder's linears, and bytes of the weight files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from upq.core.errors import UPQError
from upq.files.tensors import INDEX, WEIGHTS, shard_names
from upq.model.matrices import Matrix
from upq.nn.blocks import model_weights
from upq.nn.experts import PackedExperts, TrainedExperts
from upq.nn.packed import PackedLinear
from upq.nn.trained import TrainedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """`bits_per_weight` is the mean over the weights of the decoder blocks' linears, scales included, biases not."""

    bits_per_weight: float
    weights: int  # how many those are


def model_size(model: PreTrainedModel) -> ModelSize:
    """Counts stored bits: dtype of a dense linear, codes and scales of a packed or a fake-quantised one."""
    sizes = [_bits(weight, model.dtype) for weight in model_weights(model).values()]
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


def _bits(weight: nn.Module | Matrix, dtype: torch.dtype) -> tuple[int, float]:
    """How many weights, and the bits they are stored in; dense ones in the model's type."""
    if isinstance(weight, Matrix):
        return weight.rows * weight.inputs, weight.rows * weight.inputs * dtype.itemsize * 8.0
    if isinstance(weight, TrainedExperts):
        weight = weight.layer
    if isinstance(weight, TrainedLinear):
        with torch.no_grad():
            weight = PackedLinear.from_qtensor(weight.freeze())  # as it will be stored
    assert isinstance(weight, PackedLinear | PackedExperts)
    # codes, scales and, where groups have their own, zero points: the state is the file layout
    stored = [buffer for name, buffer in weight.named_buffers() if name.startswith("weight_")]
    return weight.rows * weight.columns, sum(buffer.numel() * buffer.element_size() * 8.0 for buffer in stored)

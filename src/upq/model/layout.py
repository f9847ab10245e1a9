"""Finds the parts of a causal LM by rule, without a list of families."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from upq.core.errors import UPQError

# What vLLM, SGLang and others keep in one matrix, by the names of Llama's linears, which most families have.
_FUSED = {f"{name}_proj": "qkv_proj" for name in "qkv"} | {f"{name}_proj": "gate_up_proj" for name in ("gate", "up")}


def fused_name(path: str) -> str | None:
    """What engines call the matrix that they make of this linear and others, or None."""
    block, _, linear = path.rpartition(".")
    return f"{block}.{_FUSED[linear]}" if linear in _FUSED else None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a causal LM keeps its parts: paths of modules.

    Law (tests/test_layout.py): found for every causal LM of transformers, but for a list of types with their reasons.
    """

    decoder: str  # the stack from embedding to final norm
    blocks: str  # the list of decoder blocks
    embedding: str
    head: str


def layout_of(model: PreTrainedModel) -> Layout:
    """The parts of a model, which may be without memory. Raises UPQError for a class that has no decoder blocks."""
    name = type(model).__name__
    paths = {id(module): path for path, module in model.named_modules()}
    embedding = paths.get(id(_asked(model, "get_input_embeddings")))
    head = paths.get(id(_asked(model, "get_output_embeddings")))
    if embedding is None or head is None:
        what = "input embedding" if embedding is None else "head over the vocabulary"
        raise UPQError(f"{name} has no {what} that transformers names; is it a causal language model?")
    lists = _block_lists(model)
    # Towers for images and sound have blocks too; the decoder's share its embedding's path.
    beside = [path for path in lists if _common(path, embedding)]
    if not beside:
        raise UPQError(
            f"{name} has no list of decoder blocks: UPQ takes the outermost ModuleList of transformers' "
            "GradientCheckpointingLayer beside the embedding; this class has none"
        )
    nearest = max(len(_common(path, embedding).split(".")) for path in beside)
    blocks = max(
        (path for path in beside if len(_common(path, embedding).split(".")) == nearest),
        key=lambda path: sum(tensor.nbytes for tensor in lists[path].state_dict().values()),
    )
    return Layout(_common(blocks, embedding), blocks, embedding, head)


def block_list(model: PreTrainedModel, layout: Layout | None = None) -> nn.ModuleList:
    """The model's own list of decoder blocks: what is put into it is in the model."""
    blocks = model.get_submodule((layout or layout_of(model)).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def shared_weights(model: PreTrainedModel) -> frozenset[str]:
    """Names of parameters that the model has in several places: what changes one of them changes all."""
    tied = model.all_tied_weights_keys
    return frozenset(tied) | frozenset(tied.values())


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost ModuleLists whose members are all gradient-checkpointing layers, by path."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        blocks = isinstance(module, nn.ModuleList) and len(module) and all(map(_is_block, module))
        if blocks and not any(path.startswith(f"{outer}.") for outer in lists):
            lists[path] = module
    return lists


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def _asked(model: PreTrainedModel, getter: str) -> nn.Module | None:
    try:
        found: nn.Module | None = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None
    return found


def _common(a: str, b: str) -> str:
    """The path of the innermost module that holds both."""
    parts = zip(a.split("."), b.split("."), strict=False)
    return ".".join(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], parts))

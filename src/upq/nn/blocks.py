"""The weights of a decoder block that are codes or could be, whatever form they are in now."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from upq.model.layout import block_list, layout_of, shared_weights
from upq.model.matrices import Matrix, matrices
from upq.nn.experts import PackedExperts, TrainedExperts
from upq.nn.packed import PackedLinear
from upq.nn.trained import TrainedLinear

CODED = (PackedLinear, PackedExperts, TrainedLinear, TrainedExperts)


def block_weights(block: nn.Module) -> dict[str, nn.Module | Matrix]:
    """By name, in the order of the modules: the layer of what is coded, and the matrix of what is dense."""
    dense, found = matrices(block), dict[str, nn.Module | Matrix]()
    for path, module in block.named_modules():
        if isinstance(module, CODED):
            if not any(path.startswith(f"{outer}.") for outer in found):  # experts hold what a linear would be
                found[path] = module
        else:
            found |= {matrix.name: matrix for matrix in dense if matrix.module == path}
    return found


def model_weights(model: PreTrainedModel) -> dict[str, nn.Module | Matrix]:
    """`block_weights` of all blocks, by path in the model."""
    layout, shared = layout_of(model), shared_weights(model)
    return {
        path: weight
        for index, block in enumerate(block_list(model, layout))
        for name, weight in block_weights(block).items()
        if not isinstance(weight, Matrix) or f"{layout.blocks}.{index}.{weight.parameter}" not in shared
        for path in (f"{layout.blocks}.{index}.{name}",)
    }


def of_experts(weight: nn.Module | Matrix | None) -> bool:
    """Whether it is a tensor of experts, and no linear."""
    return isinstance(weight, PackedExperts | TrainedExperts) or (isinstance(weight, Matrix) and weight.experts > 0)

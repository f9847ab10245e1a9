"""The weights of a decoder block that become codes: linears, and the tensors of experts.

Shape suffixes: E experts, O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from upq.model.experts import stand_in
from upq.model.online import rotate_input, rotation_of

# Of expert modules that `use_experts_implementation` does not decorate, whose tensors are stored (E, I, O).
_TRANSPOSED = {"Llama4TextExperts"}
_ROUTERS = {"gate", "router", "shared_expert_gate", "shared_gate"}
_STATE = 8  # a linear of a state-space mixer this many times smaller than its largest one computes its state


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight (E·O, I) of a block: of a linear, or all experts' one below the other.

    A scale belongs to a row or a part of it, so grids and stores see one tall matrix.
    """

    name: str  # within the block: the path of the linear, or of the experts' parameter
    outputs: int  # O
    inputs: int  # I
    experts: int = 0  # E; 0: a linear
    transposed: bool = False  # its parameter is (I, O), or (E, I, O)

    @property
    def parameter(self) -> str:
        """Path of the parameter within the block."""
        return self.name if self.experts else f"{self.name}.weight"

    @property
    def rows(self) -> int:
        return self.outputs * max(1, self.experts)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.inputs

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        shape = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        return (self.experts, *shape) if self.experts else shape

    @property
    def module(self) -> str:
        """Path of the module that multiplies."""
        return self.name.rpartition(".")[0] if self.experts else self.name

    def flat(self, parameter: Tensor) -> Tensor:
        """(E·O, I), of a tensor that has the parameter's shape."""
        tensor = parameter.transpose(-1, -2) if self.transposed else parameter
        return tensor.reshape(self.shape)

    def shaped(self, weight: Tensor) -> Tensor:
        """What `flat` was given. A view where it can be."""
        tensor = weight.reshape(self.experts, self.outputs, self.inputs) if self.experts else weight
        return tensor.transpose(-1, -2) if self.transposed else tensor

    def read(self, block: nn.Module) -> Tensor:
        """The weight (E·O, I) of a block."""
        return self.flat(block.get_parameter(self.parameter).detach())

    @torch.no_grad()
    def write(self, block: nn.Module, weight: Tensor) -> None:
        block.get_parameter(self.parameter).copy_(self.shaped(weight))


def matrices(block: nn.Module) -> tuple[Matrix, ...]:
    """The weights of `block` that become codes, in the order of its modules. It may be without memory."""
    return tuple(found for found, reason in _judged(block) if reason is None and isinstance(found, Matrix))


def products(block: nn.Module) -> tuple[Matrix, ...]:
    """All linears and tensors of experts, those too that do not become codes."""
    return tuple(found for found, _ in _judged(block) if isinstance(found, Matrix))


def place(block: nn.Module, matrix: Matrix, layer: nn.Module) -> None:
    """`layer` takes the place of a linear of `block`, or of a parameter of its experts."""
    if matrix.experts:
        stand_in(block.get_submodule(matrix.module), matrix.name.rpartition(".")[2], layer)
    else:
        if (rotation := rotation_of(block.get_submodule(matrix.name))) is not None:
            rotate_input(layer, rotation)
        block.set_submodule(matrix.name, layer)


def left_out(block: nn.Module) -> dict[str, str]:
    """Paths of the other parameters of `block` that are more than vectors, and why they stay as they are."""
    return {
        (found.parameter if isinstance(found, Matrix) else found): reason
        for found, reason in _judged(block)
        if reason is not None
    }


def _judged(block: nn.Module) -> Iterator[tuple[Matrix | str, str | None]]:
    """Every parameter of two dimensions or more: as a matrix where it is one, with the reason for leaving it out."""
    for path, module in block.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            name = f"{path}.{leaf}".lstrip(".")
            matrix = _matrix(module, path, name, leaf, parameter)
            if matrix is None:
                yield name, _kind(module)
            elif not matrix.experts and path.rpartition(".")[2] in _ROUTERS:
                yield matrix, "router"
            elif not matrix.experts and _computes_state(block, path, matrix):
                yield matrix, "small parameter of the state"
            else:
                yield matrix, None


def _matrix(module: nn.Module, path: str, name: str, leaf: str, parameter: Tensor) -> Matrix | None:
    if leaf == "weight" and parameter.dim() == 2 and _multiplies(type(module)):  # type: ignore[arg-type]
        transposed = isinstance(module, Conv1D)
        outputs, inputs = reversed(parameter.shape) if transposed else parameter.shape
        return Matrix(path, outputs, inputs, transposed=transposed)
    if parameter.dim() == 3 and _is_experts(module, parameter):
        transposed = bool(getattr(module, "is_transposed", type(module).__name__ in _TRANSPOSED))
        outputs, inputs = reversed(parameter.shape[1:]) if transposed else parameter.shape[1:]
        return Matrix(name, outputs, inputs, parameter.shape[0], transposed)
    return None


@cache
def _multiplies(kind: type[nn.Module]) -> bool:
    """Whether modules of this class compute `x Wᵀ + b` and nothing else."""
    if kind in (nn.Linear, Conv1D):
        return True
    if not issubclass(kind, nn.Linear):
        return False
    try:
        module = kind(4, 3)
        x = torch.linspace(-1, 1, 8).view(2, 4)
        for parameter in module.parameters():
            parameter.data = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
        return torch.allclose(module(x), F.linear(x, module.weight, module.bias))
    except (TypeError, RuntimeError, AttributeError):  # it is made of something else, or gives something else
        return False


def _is_experts(module: nn.Module, parameter: Tensor) -> bool:
    convolves = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    of_experts = "Experts" in type(module).__name__ or getattr(module, "num_experts", None) == parameter.shape[0]
    return not convolves and (hasattr(module, "is_transposed") or of_experts)


def _computes_state(block: nn.Module, path: str, matrix: Matrix) -> bool:
    """A linear whose product becomes step sizes or decays of a state-space mixer (Mamba, gated delta networks)."""
    mixer = block.get_submodule(path.rpartition(".")[0])
    if not any("A_log" in leaf or "dt_bias" in leaf for leaf, _ in mixer.named_parameters(recurse=False)):
        return False
    return matrix.rows * matrix.inputs * _STATE <= max(_size(child) for child in mixer.children())


def _size(linear: nn.Module) -> int:
    """Weights of a linear, which may be packed."""
    weight = linear._parameters.get("weight")
    if weight is not None:
        return weight.numel() if weight.dim() == 2 else 0
    return int(getattr(linear, "rows", 0) * getattr(linear, "columns", 0))


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution"
    name = type(module).__name__
    return "router" if "Router" in name or "TopK" in name else f"parameter of {name}"

"""Building the student, and turning it into codes again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from upq.core.act_scheme import ActScheme
from upq.model.layout import block_list, layout_of, shared_weights
from upq.model.matrices import matrices, place
from upq.model.online import install
from upq.model.source import Source
from upq.nn.activations import ActQuantiser, attach
from upq.nn.experts import TrainedExperts
from upq.nn.fixed_codes import Start
from upq.nn.kv import KvQuantiser, attach_kv
from upq.nn.trained import TrainedLinear, full_tensor

Starts = Mapping[str, Start]  # by the path of a linear


def make_student(teacher: PreTrainedModel, solutions: Starts, *, train_norms: bool) -> PreTrainedModel:
    """A model whose block linears are TrainedLinear, started from `solutions`.

    Everything else is shared with the teacher, memory included, unless it is trained (`train_norms`).
    """
    student = _skeleton_like(teacher)
    prefix = layout_of(teacher).blocks
    for index, block in enumerate(block_list(student)):
        start = f"{prefix}.{index}."
        of_block = {path.removeprefix(start): each for path, each in solutions.items() if path.startswith(start)}
        _put(block, of_block, teacher.device)
    if train_norms:
        _own(norms(student))
    student.eval()  # type: ignore[no-untyped-call]  # no dropout: the teacher's distribution is the target
    return student


def load_student(
    source: Source,
    solutions: Callable[[int], Starts],
    *,
    train_norms: bool,
    after: Callable[[nn.Module, nn.Module], None] | None = None,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """What `make_student` gives, read from the disk one decoder block at a time, and the original without its blocks.

    `solutions` gives those of a block, by the names of its linears. `after` is called with each block of the student
    and of the original, which is freed then.
    Law (tests/test_distill_teacher.py): that student, bit for bit.
    """
    original = source.without_blocks()
    student = make_student(original, {}, train_norms=train_norms)

    def prepare(index: int, block: nn.Module) -> nn.Module:
        twin = make_student_block(block, solutions(index), train_norms=train_norms)
        if after is not None:
            after(twin, block)
        return twin

    source.fill_blocks(student, prepare)
    return student, original


def make_student_block(block: nn.Module, solutions: Starts, *, train_norms: bool) -> nn.Module:
    """`make_student` for one decoder block alone."""
    shared: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in block.parameters()}
    twin = copy.deepcopy(block, shared)
    _put(twin, solutions, next(block.parameters()).device)
    if train_norms:
        _own(_norms(twin))
    return twin.eval()


def _put(block: nn.Module, solutions: Starts, device: torch.device) -> None:
    for matrix in matrices(block):
        if (solution := solutions.get(matrix.name)) is None:
            continue
        if matrix.experts:
            place(block, matrix, TrainedExperts(solution.layer(None, device), matrix))
        else:
            bias = block.get_submodule(matrix.name).bias
            assert isinstance(bias, Tensor | None)
            place(block, matrix, solution.layer(bias, device))


def _own(norms: dict[str, nn.Module]) -> None:
    """From here on the norms share nothing, and learn."""
    for norm in norms.values():
        norm.weight = nn.Parameter(norm_weight(norm).detach().float().clone())


def start_norms(student: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Put in norms that an earlier training left, by parameter name. Nothing is shared with the teacher afterwards."""
    for name, weight in weights.items():
        norm = student.get_submodule(name.removesuffix(".weight"))
        old = norm_weight(norm)
        norm.weight = nn.Parameter(weight.to(old.device, old.dtype), requires_grad=old.requires_grad)


def checkpoint_blocks(student: PreTrainedModel) -> None:
    """From here on each decoder block keeps its inputs for the backward pass, and runs again in it."""
    for block in block_list(student):
        # transformers' own switch asks for training mode, which would bring dropout back. `forward` and not the call:
        # hooks, those that record hidden states and those of FSDP, stay outside and run once.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def norms(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The normalisation layers (one-dimensional weight) of the decoder, by path; none that blocks share."""
    decoder, shared = layout_of(model).decoder, shared_weights(model)
    return {
        name: norm
        for name, norm in _norms(model).items()
        if name.startswith(f"{decoder}.") and f"{name}.weight" not in shared
    }


def _norms(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: part
        for name, part in module.named_modules()
        if "norm" in name.rpartition(".")[2]
        and isinstance(weight := part._parameters.get("weight"), Tensor)
        and weight.dim() == 1
    }


def norm_weight(norm: nn.Module) -> Tensor:
    """A normalisation layer's weight; its class is the model's own."""
    assert isinstance(norm.weight, Tensor)
    return norm.weight


def trained_linears(model: nn.Module) -> dict[str, TrainedLinear]:
    """By the name of the weight: what is inside of experts stands under the experts' name."""
    found = dict[str, TrainedLinear]()
    for name, module in model.named_modules():
        if isinstance(module, TrainedExperts):
            found[name] = module.layer
        elif isinstance(module, TrainedLinear) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found


def trained_blocks(student: PreTrainedModel) -> Iterator[tuple[int, dict[str, Start]]]:
    """Index of a block and what its linears have become, by name: exactly what the forward pass computes with.

    Where each process has shards, every process has to go through all blocks.
    """
    for index, block in enumerate(block_list(student)):
        yield index, {name: layer.solution() for name, layer in trained_linears(block).items()}


def round_activations(
    student: PreTrainedModel,
    activations: ActScheme | None,
    kv: ActScheme | None,
    scales: Callable[[int], Mapping[str, float]],
) -> None:
    """From here on the student reads rounded inputs, keys and values. `scales`: of a block's static inputs, by name."""
    for index, block in enumerate(block_list(student)):
        attach_kv(block, kv)
        if activations is None:
            continue
        of_block = scales(index)
        for name, layer in trained_linears(block).items():
            layer.input = ActQuantiser(activations, of_block.get(name))


@torch.no_grad()
def frozen(student: PreTrainedModel, *, keep: bool = True) -> PreTrainedModel:
    """A plain model of the weights that the student computes with now, each as its codes say. All else is shared.

    Law (tests/test_on_policy.py): its logits are the student's. Where the student is sharded, every process has to call
    this, and those without `keep` get a model without memory.
    """
    with torch.device("meta"):
        twin = type(student)(student.config)
    blocks, trained = layout_of(student).blocks, trained_linears(student)
    dense = dict[str, nn.Parameter]()
    for index, block in enumerate(block_list(twin)):
        for matrix in matrices(block):
            if (layer := trained.get(f"{blocks}.{index}.{matrix.name}")) is not None:
                weight = layer.freeze().dequantize()
                if keep:
                    dense[f"{blocks}.{index}.{matrix.parameter}"] = nn.Parameter(matrix.shaped(weight), False)
    for name in [name for name, _ in twin.named_parameters(remove_duplicate=False)]:
        path, _, leaf = name.rpartition(".")
        if name not in dense and (shared := getattr(student.get_submodule(path), leaf, None)) is not None:
            value = full_tensor(shared.detach())
            if keep:
                dense[name] = nn.Parameter(value, False)
    for name, parameter in dense.items():
        path, _, leaf = name.rpartition(".")
        twin.get_submodule(path)._parameters[leaf] = parameter
    for name in [name for name, _ in twin.named_buffers(remove_duplicate=False)]:
        path, _, leaf = name.rpartition(".")
        twin.get_submodule(path)._buffers[leaf] = getattr(student.get_submodule(path), leaf)
    install(twin, student.config)
    for path, layer in trained.items():
        if layer.input is not None:
            attach(twin.get_submodule(path), layer.input)
    for path, module in student.named_modules():
        if isinstance(module, KvQuantiser):
            attach_kv(twin.get_submodule(path.rpartition(".")[0]), module.scheme)
    return twin.eval()  # type: ignore[no-any-return, no-untyped-call]


def _skeleton_like(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of the same class that shares every parameter and buffer, with gradients off."""
    with torch.device("meta"):
        twin = type(model)(model.config)
    install(twin, model.config)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner)._parameters[leaf] = nn.Parameter(parameter.detach(), requires_grad=False)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner)._buffers[leaf] = buffer
    return twin

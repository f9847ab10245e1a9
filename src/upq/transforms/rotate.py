"""Rotations that fold into weights: of the residual stream, and of each head's values (QuaRot, 2404.00456).

And of linears' inputs, which have to be turned while the model runs: QuaRot's at the input of down, MR-GPTQ's block by
block at every input (2509.23202).

Weights and activations with few large entries become Gaussian, which grids of even steps hold better. RMS norms commute
with a rotation once their weights are folded into the linears behind them.

Shape suffixes: H hidden size, D head size, O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from upq.core.config import Strict
from upq.core.errors import UPQError
from upq.core.hadamard import hadamard, orthogonal, randomised
from upq.grids import check_scheme
from upq.model.layout import block_list
from upq.model.matrices import Matrix
from upq.model.online import OnlineRotation, rotate_input, rotation_of
from upq.model.source import Source
from upq.model.walker import Step
from upq.transforms._base import TRANSFORMS, Calibrate, Run, Transform, same
from upq.transforms._choice import Choice, Watch
from upq.transforms._residual import Residual, residual, rms_offset

_ROWS = 1 << 14  # of an embedding at a time, in float64


@TRANSFORMS.register("rotate")
class Rotate(Transform):
    class Config(Strict):
        sites: tuple[Literal["residual", "value", "down", "inputs"], ...] = ("residual", "value")
        matrix: Literal["hadamard", "orthogonal"] = "hadamard"
        seed: int = 0
        untie: bool = False  # a head that is tied to the embedding may get weights of its own
        block: int = Field(128, ge=2)  # channels of a Hadamard matrix at `inputs`
        choose: Choice | None = None  # of residual, value and down, those that lose less (RoSTE)

    def __init__(self, config: Config, blocks: Mapping[str, Iterable[int]] | None = None) -> None:
        """`blocks`: by site, those blocks that turn it; None: all do."""
        self.config, self.blocks = config, blocks

    @property
    def needs_inputs(self) -> bool:
        return self.config.choose is not None

    def choose(self, source: Source, steps: Iterable[Step]) -> dict[str, Any] | None:
        """RoSTE's lower level (2502.09003, equation 6): what turns, by the squared error of rounded inputs and weights.

        Each site is measured with the others as they are. `residual` is one choice for the model; `value` and `down`
        are one for each block.
        """
        if self.config.choose is None:
            return None
        rounded, sites = self.config.choose, self.config.sites
        width, matrix_of = source.text.hidden_size, self._matrix
        found = {site: list[tuple[float, float]]() for site in sites}
        for step in steps:
            block = source.block(step.index)
            watch = Watch(block, step, rounded)
            if "residual" in sites:
                found["residual"].append(watch.stream(width, matrix_of(width)))
            if "value" in sites:
                found["value"].append(watch.values(_attentions(block), matrix_of))
            if "down" in sites:
                names = [m for m in source.matrices(step.index) if _down(block, m, source)]
                found["down"].append(watch.inputs(names, matrix_of))
            step.advance(block)
        blocks = {
            site: [index for index, (plain, turned) in enumerate(errors) if turned < plain]
            for site, errors in found.items()
        }
        if "residual" in sites:
            plain, turned = (sum(each) for each in zip(*found["residual"], strict=True))
            blocks["residual"] = list(range(len(source))) if turned < plain else []
        return {"blocks": blocks, "errors": {site: [list(each) for each in errors] for site, errors in found.items()}}

    def settled(self, choice: Mapping[str, Any]) -> Rotate:
        blocks = choice["blocks"]
        sites = tuple(site for site in self.config.sites if blocks[site])
        return Rotate(self.config.model_copy(update={"sites": sites, "choose": None}), blocks)

    def _turns(self, site: str, index: int) -> bool:
        return site in self.config.sites and (self.blocks is None or index in self.blocks[site])

    def check(self, name: str, source: Source) -> None:
        width: int = source.text.hidden_size
        self._check_online(name, source)
        if (rounded := self.config.choose) is not None:
            check_scheme(rounded.scheme())
            if "inputs" in self.config.sites or self.config.matrix != "hadamard" or rounded.activations.static:
                raise UPQError(
                    f"{name}.method.choose: for sites residual, value and down, matrix=hadamard and activations that"
                    " are not static"
                )
        if "residual" not in self.config.sites:
            return
        self._matrix(width)
        if self.unties(source) and not self.config.untie:
            weights = source.outline.get_submodule(source.layout.embedding).get_parameter("weight").numel()
            raise UPQError(
                f"{name}: the head is tied to the embedding and would get {weights / 1e6:,.1f} million weights of its"
                f" own; set {name}.method.untie=true, or {name}.method.sites=[value]"
            )
        self._final_norm(source.outline, source, shape_only=True)

    def _check_online(self, name: str, source: Source) -> None:
        sites = self.config.sites
        if {"down", "inputs"} <= set(sites):
            raise UPQError(f"{name}.method.sites: `inputs` turns the input of down too; leave `down` out")
        for path, matrix in self._turned_inputs(source).items():
            if matrix.experts:
                raise UPQError(f"{name}: {path} holds experts, whose inputs are not turned yet; leave `inputs` out")
            if rotation_of(source.outline.get_submodule(path)) is not None:
                raise UPQError(f"{name}: an earlier stage turns the input of {path}; leave `down` and `inputs` out")
            if "inputs" in sites and matrix.inputs % self.config.block:
                raise UPQError(
                    f"{name}.method.block: {path} has {matrix.inputs} inputs, no multiple of {self.config.block}"
                )
            try:
                hadamard(self._width(matrix))
            except UPQError:
                raise UPQError(
                    f"{name}: no Hadamard matrix of {path}'s width {self._width(matrix)} is known; set"
                    f" {name}.method.sites=[inputs] with a block that divides it, or leave `down` out"
                ) from None
        if "down" in sites and not self._turned_inputs(source):
            raise UPQError(f"{name}: no linear beside attention writes the stream; leave `down` out")

    def _turned_inputs(self, source: Source) -> dict[str, Matrix]:
        """By path, the linears whose inputs are turned while the model runs."""
        found = dict[str, Matrix]()
        for index, block in enumerate(block_list(source.outline, source.layout)):
            for matrix in source.matrices(index):
                if "inputs" in self.config.sites or (self._turns("down", index) and _down(block, matrix, source)):
                    found[source.path_of(index, matrix.name)] = matrix
        return found

    def _width(self, matrix: Matrix) -> int:
        return self.config.block if "inputs" in self.config.sites else matrix.inputs

    def online(self, source: Source) -> dict[str, OnlineRotation]:
        seed = None if "inputs" in self.config.sites else self.config.seed  # MR-GPTQ's has no signs
        return {
            path: OnlineRotation(block=self._width(matrix), seed=seed)
            for path, matrix in self._turned_inputs(source).items()
        }

    @property
    def stays(self) -> str:
        turned = {"down": "the input of down", "inputs": "the inputs of linears"}
        return next((turned[site] for site in self.config.sites if site in turned), "")

    def unties(self, source: Source) -> bool:
        head = f"{source.layout.head}.weight"
        return "residual" in self.config.sites and head in source.outline.all_tied_weights_keys

    @torch.no_grad()
    def block(self, index: int, block: nn.Module, source: Source, run: Run, calibrate: Calibrate) -> None:
        width: int = source.text.hidden_size
        states = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(index)).to(source.device)
        if "residual" in self.config.sites:
            turn_HH = self._matrix(width).to(source.device)
            expected = _turned(run(block, states), turn_HH)
            _rotate_stream(block, residual(block, width, run), turn_HH)
            got = run(block, _turned(states, turn_HH))
            if not same(got, expected):
                raise UPQError(
                    f"{source.path}: rotate does not know {type(block).__name__}: with its residual stream rotated,"
                    f" block {index} would compute something else; set sites=[value], or leave the transform out"
                )
            states = _turned(states, turn_HH)
        expected_whole = run(block, states)
        if self._turns("value", index):
            expected = run(block, states)
            self._rotate_values(block)
            if not same(run(block, states), expected):
                raise UPQError(
                    f"{source.path}: rotate does not know how {type(block).__name__} uses its values;"
                    " set sites=[residual], or leave the transform out"
                )
        rotations = self.online(source)
        for matrix in source.matrices(index):
            if (rotation := rotations.get(source.path_of(index, matrix.name))) is not None:
                _turn_inputs(block, matrix, rotation)
        if rotations and not same(run(block, states), expected_whole):
            raise UPQError(
                f"{source.path}: rotate does not know {type(block).__name__}: with turned inputs block {index} would"
                " compute something else; leave `down` and `inputs` out"
            )

    @torch.no_grad()
    def frame(self, model: PreTrainedModel, source: Source) -> None:
        if "residual" not in self.config.sites:
            return
        turn_HH = self._matrix(source.text.hidden_size).to(source.device)
        norm, offset = self._final_norm(model, source)
        embedding = model.get_submodule(source.layout.embedding).get_parameter("weight")
        head = model.get_submodule(source.layout.head)
        gain_H = norm.get_parameter("weight").double() + offset
        weight = torch.cat(
            [_times(part * gain_H, turn_HH) for part in torch.split(head.get_parameter("weight"), _ROWS)]
        )
        head.weight = nn.Parameter(weight, requires_grad=False)
        embedding.copy_(torch.cat([_times(part, turn_HH) for part in torch.split(embedding, _ROWS)]))
        norm.get_parameter("weight").fill_(1 - offset)

    def _matrix(self, width: int) -> Tensor:
        make = randomised if self.config.matrix == "hadamard" else orthogonal
        return make(width, self.config.seed)

    def _final_norm(
        self, model: PreTrainedModel, source: Source, *, shape_only: bool = False
    ) -> tuple[nn.Module, float]:
        """The one RMS norm beside the blocks, and what it adds to its weight."""
        width, found = source.text.hidden_size, list[tuple[nn.Module, float]]()
        for module in model.get_submodule(source.layout.decoder).children():
            if shape_only:
                names = [name for name, _ in module.named_parameters()]
                offset = 0.0 if names == ["weight"] and module.get_parameter("weight").shape == (width,) else None
            else:
                offset = rms_offset(module, width)
            if offset is not None:
                found.append((module, offset))
        if len(found) != 1:
            raise UPQError(f"{source.path}: rotate does not know {type(model).__name__}: it has no RMS norm at its end")
        return found[0]

    def _rotate_values(self, block: nn.Module) -> None:
        for value, output, size in _attentions(block):
            turn_DD = self._matrix(size).to(value.weight.device)
            heads = value.weight.double().view(-1, size, value.in_features)
            value.weight.copy_((turn_DD.T @ heads).view_as(value.weight))
            if value.bias is not None:
                value.bias.copy_((value.bias.double().view(-1, size) @ turn_DD).view_as(value.bias))
            heads = output.weight.double().view(output.out_features, -1, size)
            output.weight.copy_((heads @ turn_DD).view_as(output.weight))


def _rotate_stream(block: nn.Module, parts: Residual, turn_HH: Tensor) -> None:
    gains = {path: block.get_submodule(path).get_parameter("weight").double() + o for path, o in parts.norms.items()}
    for name, norm in parts.readers.items():
        weight = block.get_parameter(name)
        if name in parts.transposed:  # (…, I, O)
            weight.copy_(turn_HH.T @ (gains[norm][:, None] * weight))
        else:
            weight.copy_((weight * gains[norm]) @ turn_HH)
    for matrix in parts.writers:
        weight = block.get_parameter(matrix.parameter)
        turned = weight.double() @ turn_HH if matrix.transposed else turn_HH.T @ weight.double()
        weight.copy_(turned)
        bias = dict(block.named_parameters()).get(
            f"{matrix.parameter}_bias" if matrix.experts else f"{matrix.name}.bias"
        )
        if bias is not None:
            bias.copy_(bias.double() @ turn_HH)
    for path in set(parts.readers.values()):
        block.get_submodule(path).get_parameter("weight").fill_(1 - parts.norms[path])


def _attentions(block: nn.Module) -> Iterator[tuple[nn.Linear, nn.Linear, int]]:
    """The linear that makes the values, the one that reads them, and the size of a head."""
    for attention in block.modules():
        children: dict[str, Any] = dict(attention.named_children())
        value, size = children.get("v_proj"), getattr(attention, "head_dim", None)
        output = next((children[name] for name in ("o_proj", "out_proj", "dense") if name in children), None)
        if isinstance(value, nn.Linear) and isinstance(output, nn.Linear) and isinstance(size, int):
            yield value, output, size


def _down(block: nn.Module, matrix: Matrix, source: Source) -> bool:
    """Whether it is the last linear of a feed-forward part: it writes the stream, and is none of attention's."""
    parent = type(block.get_submodule(matrix.name.rpartition(".")[0])).__name__
    wide = matrix.outputs == source.text.hidden_size and matrix.inputs != matrix.outputs
    return wide and not matrix.experts and "Attention" not in parent


def _turn_inputs(block: nn.Module, matrix: Matrix, rotation: OnlineRotation) -> None:
    """Its columns, by the same matrix: (x·H)·(W·H)ᵀ = x·Wᵀ."""
    width = rotation.block
    turn = hadamard(width) if rotation.seed is None else randomised(width, rotation.seed)
    weight = matrix.read(block).double()
    turned = weight.reshape(-1, width) @ turn.to(weight.device)
    matrix.write(block, turned.view_as(weight).float())
    rotate_input(block.get_submodule(matrix.name), rotation)


def _times(rows: Tensor, turn_HH: Tensor) -> Tensor:
    return (rows.double() @ turn_HH).float()


def _turned(states: Tensor, turn_HH: Tensor) -> Tensor:
    return (states.double() @ turn_HH).to(states.dtype)

"""Rotations that fold into weights: of the residual stream, and of each head's values (QuaRot, 2404.00456).

Weights and activations with few large entries become Gaussian, which grids of even steps hold better. RMS norms commute
with a rotation once their weights are folded into the linears behind them.

Shape suffixes: H hidden size, D head size, O out, I in.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from upq.core.config import Strict
from upq.core.errors import UPQError
from upq.core.hadamard import orthogonal, randomised
from upq.model.source import Source
from upq.transforms._base import TRANSFORMS, Calibrate, Run, Transform, same
from upq.transforms._residual import Residual, residual, rms_offset

_ROWS = 1 << 14  # of an embedding at a time, in float64


@TRANSFORMS.register("rotate")
class Rotate(Transform):
    class Config(Strict):
        sites: tuple[Literal["residual", "value"], ...] = ("residual", "value")
        matrix: Literal["hadamard", "orthogonal"] = "hadamard"
        seed: int = 0
        untie: bool = False  # a head that is tied to the embedding may get weights of its own

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self, name: str, source: Source) -> None:
        width: int = source.text.hidden_size
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
        if "value" in self.config.sites:
            expected = run(block, states)
            self._rotate_values(block)
            if not same(run(block, states), expected):
                raise UPQError(
                    f"{source.path}: rotate does not know how {type(block).__name__} uses its values;"
                    " set sites=[residual], or leave the transform out"
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
        for attention in block.modules():
            children: dict[str, Any] = dict(attention.named_children())
            value, size = children.get("v_proj"), getattr(attention, "head_dim", None)
            output = next((children[name] for name in ("o_proj", "out_proj", "dense") if name in children), None)
            if not (isinstance(value, nn.Linear) and isinstance(output, nn.Linear) and isinstance(size, int)):
                continue
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


def _times(rows: Tensor, turn_HH: Tensor) -> Tensor:
    return (rows.double() @ turn_HH).float()


def _turned(states: Tensor, turn_HH: Tensor) -> Tensor:
    return (states.double() @ turn_HH).to(states.dtype)

"""What a rotation does to the error of rounding, site by site (RoSTE, 2502.09003, section 3.2).

Shape suffixes: T tokens, H hidden size, D head size, O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from upq.core.act_scheme import ActScheme
from upq.core.config import Strict
from upq.core.scheme import PER_CHANNEL, QuantScheme
from upq.grids import GRIDS
from upq.model.activations import batches
from upq.model.matrices import Matrix
from upq.model.walker import Step
from upq.nn.activations import ActQuantiser
from upq.transforms._residual import residual

Errors = tuple[float, float]  # as it is, and turned
_EPS = 1e-6  # of an RMS norm


class Choice(Strict):
    """How weights and inputs are rounded for the choice. The range of a row of weights is not searched."""

    bits: int = 4
    grid: str = "affine"
    group_size: int = PER_CHANNEL
    activations: ActScheme = ActScheme(bits=4, symmetric=False)

    def scheme(self) -> QuantScheme:
        return QuantScheme(bits=self.bits, grid=self.grid, group_size=self.group_size)


class Watch:
    """One block of the original, and the calibration rows at its input.

    An error is ‖Q(W) - W‖² of weights, and ‖Q(x) - x‖² of inputs, summed over tokens and divided by the rows.
    """

    def __init__(self, block: nn.Module, step: Step, rounded: Choice) -> None:
        self._block, self._step = block, step
        self._scheme, self._quantiser = rounded.scheme(), ActQuantiser(rounded.activations)

    @torch.no_grad()
    def stream(self, width: int, turn_HH: Tensor) -> Errors:
        """Of all that reads or writes the residual stream."""
        parts, plain, turned = residual(self._block, width, self._run_given), 0.0, 0.0
        turn_HH = turn_HH.float()
        users = {norm: sum(of == norm for of in parts.readers.values()) for norm in parts.norms}
        for norm, count in users.items():
            one, two = self._inputs(norm, turn_HH, normed=True) if count else (0.0, 0.0)
            plain, turned = plain + count * one, turned + count * two
        for name, norm in parts.readers.items():
            weight = self._block.get_parameter(name)
            rows = (weight.transpose(-1, -2) if name in parts.transposed else weight).reshape(-1, width)
            gain_H = self._block.get_submodule(norm).get_parameter("weight") + parts.norms[norm]
            one, two = self._weights(rows * gain_H, rows * gain_H @ turn_HH)
            plain, turned = plain + one, turned + two
        for matrix in parts.writers:
            weight_OI = matrix.read(self._block)
            stacked = weight_OI.view(-1, matrix.outputs, matrix.inputs)
            one, two = self._weights(weight_OI, (turn_HH.T @ stacked).reshape(weight_OI.shape))
            plain, turned = plain + one, turned + two
        return plain, turned

    @torch.no_grad()
    def values(self, attentions: Iterable[tuple[nn.Linear, nn.Linear, int]], turn: Callable[[int], Tensor]) -> Errors:
        """Of each head's values, what makes them and what reads them."""
        plain, turned, names = 0.0, 0.0, {id(module): path for path, module in self._block.named_modules()}
        for value, output, size in attentions:
            turn_DD = turn(size).float()
            heads = value.weight.view(-1, size, value.in_features)
            of_heads = output.weight.view(output.out_features, -1, size)
            for one, two in (
                self._weights(value.weight, (turn_DD.T @ heads).view_as(value.weight)),
                self._weights(output.weight, (of_heads @ turn_DD).view_as(output.weight)),
                self._inputs(names[id(output)], turn_DD),
            ):
                plain, turned = plain + one, turned + two
        return plain, turned

    @torch.no_grad()
    def inputs(self, matrices: Iterable[Matrix], turn: Callable[[int], Tensor]) -> Errors:
        """Of the inputs of linears."""
        plain, turned = 0.0, 0.0
        for matrix in matrices:
            weight_OI, turn_II = matrix.read(self._block), turn(matrix.inputs).float()
            for one, two in (self._weights(weight_OI, weight_OI @ turn_II), self._inputs(matrix.name, turn_II)):
                plain, turned = plain + one, turned + two
        return plain, turned

    def _weights(self, weight_OI: Tensor, turned_OI: Tensor) -> Errors:
        grid = GRIDS.get(self._scheme.grid)

        def error(w_OI: Tensor) -> float:
            settled = grid.settled([w_OI])
            return float((settled.fake(w_OI, settled.init(w_OI, self._scheme), self._scheme) - w_OI).square().sum())

        return error(weight_OI.detach().float()), error(turned_OI.detach().float())

    def _inputs(self, path: str, turn: Tensor, *, normed: bool = False) -> Errors:
        """Of what a module reads, in stretches as wide as `turn`; `normed`: over the size of each token."""
        sums = [0.0, 0.0]

        def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].float()
            if normed:
                x = x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt()
            turned = (x.reshape(*x.shape[:-1], -1, len(turn)) @ turn.to(x.device)).reshape(x.shape)
            for place, each in enumerate((x, turned)):
                sums[place] += float((self._quantiser(each) - each).square().sum())

        handle = self._block.get_submodule(path).register_forward_pre_hook(see)
        rows = len(self._step.states[0])
        try:
            for part in batches(rows, self._step.batch_size):
                self._step.run(self._block, part)
        finally:
            handle.remove()
        return sums[0] / rows, sums[1] / rows

    def _run_given(self, block: nn.Module, hidden_BTH: Tensor) -> Tensor:
        replay = self._step.replay
        assert replay is not None
        call = replay.call(self._step.index, torch.arange(hidden_BTH.shape[1])[None])
        out = block(hidden_BTH, *call.args, **call.kwargs)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

"""Smoothing: a factor for each channel moves large values of an activation into the weights that read it.

What writes the channel is divided by its factor: the weight of an RMS norm, or the rows of a linear whose outputs reach
the next linear in proportion (`up` to `down`). What reads it is multiplied. The factors follow one of four rules:

- `percentile` (DGQ, 2310.04836): max(1, m / q), m the channel's largest value and q that at the 99.5th percentile of
  the channels;
- `smoothquant` (2211.10438, equation 4): m^α / w^(1 - α), w the largest weight that reads the channel;
- `awq` (2306.00978, equation 4): the mean magnitude to a power between 0 and 1, that of 20 under which the rounded
  weights lose least in the outputs of the calibration rows;
- `cfp` (CBQ, 2312.07950, section 3.3): √(m / t) of channels whose m is an outlier's, t the largest that is none's.

Shape suffixes: E experts, H hidden size, O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from upq.core.config import Strict
from upq.core.errors import UPQError
from upq.core.outliers import threshold
from upq.core.scheme import PER_CHANNEL, QuantScheme
from upq.grids import GRIDS, check_scheme
from upq.model.matrices import Matrix, products
from upq.model.products import seen
from upq.model.source import Source
from upq.model.walker import hidden_states
from upq.transforms._base import TRANSFORMS, Calibrate, Run, Transform, same
from upq.transforms._residual import Residual, residual

_LEAST, _POWERS = 1e-4, 20  # of a channel's largest value, and of AWQ's powers


@TRANSFORMS.register("smooth")
class Smooth(Transform):
    class Config(Strict):
        rule: Literal["percentile", "smoothquant", "awq", "cfp"] = "smoothquant"
        sites: tuple[Literal["norm", "linear"], ...] = ("norm", "linear")
        alpha: float = Field(0.5, ge=0, le=1)  # of smoothquant: 0 leaves all to the activations
        bits: int = 4  # of the weights that awq judges by, on `affine`
        group_size: int = PER_CHANNEL

        def scheme(self) -> QuantScheme:
            return QuantScheme(bits=self.bits, group_size=self.group_size, grid="affine")

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self, name: str, source: Source) -> None:
        if self.config.rule == "awq":
            check_scheme(self.config.scheme())
            for matrix in (matrix for index in range(len(source)) for matrix in source.matrices(index)):
                self.config.scheme().groups(matrix.inputs)

    @property
    def needs_inputs(self) -> bool:
        return True

    def unties(self, source: Source) -> bool:
        return False

    def frame(self, model: PreTrainedModel, source: Source) -> None: ...

    @torch.no_grad()
    def block(self, index: int, block: nn.Module, source: Source, run: Run, calibrate: Calibrate) -> None:
        width: int = source.text.hidden_size
        states = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(index)).to(source.device)
        parts = residual(block, width, run)
        expected = _written(block, parts, states, run)

        def unchanged() -> bool:
            got = _written(block, parts, states, run)
            return all(same(each, before) for each, before in zip(got, expected, strict=True))

        found = list[_Site]()
        if "norm" in self.config.sites:
            found += _behind_norms(block, parts)
        if "linear" in self.config.sites:
            found += _behind_linears(block, parts, unchanged)
        if not found:
            raise UPQError(
                f"{source.path}: smooth does not know {type(block).__name__}: in block {index} no RMS norm and no"
                " linear stands before other linears alone; leave the transform out"
            )
        with _watched(block, found, moments=self.config.rule == "awq"):
            calibrate(block)
        for site in found:
            site.divide(block, self._factors(site, block))
        if not unchanged():
            raise UPQError(
                f"{source.path}: smooth does not know {type(block).__name__}: with its channels scaled, block {index}"
                " would compute something else; set sites=[linear], or leave the transform out"
            )

    def _factors(self, site: _Site, block: nn.Module) -> Tensor:
        """(E, I) float64, positive; 1 of channels that nothing has reached."""
        peak_EI, rule = site.peak_EI.double(), self.config.rule
        if rule == "percentile":
            channels = peak_EI.shape[1]
            order_EI = peak_EI.sort(-1, descending=True).values
            baseline_E1 = order_EI[:, [min(int(0.005 * channels + 1.5), channels - 1)]]
            return (peak_EI / baseline_E1.clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(1.0)
        if rule == "cfp":
            limits = [threshold(each) for each in peak_EI]
            limit_E1 = torch.stack([each.max() if t is None else t for each, t in zip(peak_EI, limits, strict=True)])
            return (peak_EI / limit_E1[:, None].clamp_min(_LEAST)).clamp_min(1.0).sqrt()
        if rule == "smoothquant":
            weights = [abs(weight_EOI).amax(1) for weight_EOI in site.readers(block).values()]
            weight_EI = torch.stack([each.amax(0, keepdim=True) if site.joint else each for each in weights]).amax(0)
            alpha = self.config.alpha
            factor_EI = peak_EI.clamp_min(_LEAST).pow(alpha) / weight_EI.double().clamp_min(_LEAST).pow(1 - alpha)
            return factor_EI.where(peak_EI > 0, 1.0)
        return self._awq(site, block)

    def _awq(self, site: _Site, block: nn.Module) -> Tensor:
        scheme, grid = self.config.scheme(), GRIDS.get(self.config.scheme().grid)
        readers, mean_EI = site.readers(block), site.mean_EI.double()
        best_EI, least_E = torch.ones_like(mean_EI), torch.full_like(mean_EI[:, 0], torch.inf)
        for power in range(_POWERS):
            factor_EI = mean_EI.clamp_min(_LEAST).pow(power / _POWERS)
            factor_EI = factor_EI / (factor_EI.amax(-1, keepdim=True) * factor_EI.amin(-1, keepdim=True)).sqrt()
            factor_EI = factor_EI.where(mean_EI > 0, 1.0)
            error_E = torch.zeros_like(least_E)
            for weight_EOI in readers.values():
                times_EOI = (weight_EOI * factor_EI[:, None]).float()
                flat_OI = times_EOI.flatten(0, 1)
                rounded_EOI = grid.fake(flat_OI, grid.init(flat_OI, scheme), scheme).view_as(times_EOI)
                lost_EOI = rounded_EOI.double() / factor_EI[:, None] - weight_EOI.double()
                lost_E = ((lost_EOI @ site.moment_EII.double()) * lost_EOI).sum((1, 2))
                error_E += lost_E.sum() if site.joint else lost_E
            better_E = error_E < least_E
            best_EI[better_E], least_E[better_E] = factor_EI[better_E], error_E[better_E]
        return best_EI


@dataclass
class _Site:
    """A tensor of I channels, who writes it and who reads it. E is 1 where no experts have channels of their own."""

    channels: int
    experts: int  # E
    norm: str = ""  # path of the norm that writes it
    offset: float = 0.0  # what that adds to its weight
    writer: Matrix | None = None  # or a weight
    rows: slice = field(default_factory=lambda: slice(None))  # of it, or of each of its experts
    read: list[tuple[str, bool]] = field(default_factory=list)  # parameters, and which are (…, I, O)
    watched: Matrix | None = None  # whose inputs are the tensor
    tokens: int = 0
    peak_EI: Tensor = field(init=False)
    mean_EI: Tensor = field(init=False)  # of magnitudes; a sum, of which only the proportions count
    moment_EII: Tensor = field(init=False)

    @property
    def joint(self) -> bool:
        """Whether its readers, if they are experts, share their channels."""
        return self.experts == 1

    def begin(self, device: torch.device, *, moments: bool) -> None:
        self.peak_EI = torch.zeros(self.experts, self.channels, device=device)
        self.mean_EI = torch.zeros_like(self.peak_EI)
        size = self.channels if moments else 0
        self.moment_EII = torch.zeros(self.experts, size, size, device=device)

    def see(self, expert: int, x: Tensor) -> None:
        x_TI = x.reshape(-1, self.channels).float()
        if not len(x_TI):
            return
        self.peak_EI[expert] = torch.maximum(self.peak_EI[expert], x_TI.abs().amax(0))
        self.mean_EI[expert] += x_TI.abs().sum(0)
        if self.moment_EII.numel():
            self.moment_EII[expert] += x_TI.T @ x_TI

    def readers(self, block: nn.Module) -> dict[str, Tensor]:
        """(E, O, I), or (1, O, I) of linears; experts that share their channels have an E of their own."""
        found = dict[str, Tensor]()
        for name, transposed in self.read:
            parameter = block.get_parameter(name)
            weight: Tensor = parameter.transpose(-1, -2) if transposed else parameter
            found[name] = weight if weight.dim() == 3 else weight[None]
        return found

    def divide(self, block: nn.Module, factor_EI: Tensor) -> None:
        """The channels by their factors (E, I), and what reads them makes up for it."""
        if self.writer is None:
            weight = block.get_submodule(self.norm).get_parameter("weight")
            weight.copy_((weight.double() + self.offset) / factor_EI[0] - self.offset)
        else:
            parameter = block.get_parameter(self.writer.parameter)
            rows = parameter.transpose(-1, -2) if self.writer.transposed else parameter
            rows_EOI = (rows if rows.dim() == 3 else rows[None])[:, self.rows]
            rows_EOI.copy_(rows_EOI.double() / factor_EI[..., None])
            if (bias := _bias(block, self.writer)) is not None:
                bias_EO = (bias if bias.dim() == 2 else bias[None])[:, self.rows]
                bias_EO.copy_(bias_EO.double() / factor_EI)
        for weight_EOI in self.readers(block).values():
            weight_EOI.copy_(weight_EOI.double() * factor_EI[:, None])


def _written(block: nn.Module, parts: Residual, states: Tensor, run: Run) -> list[Tensor]:
    """What each writer adds to the stream, and the block's output: beside the stream, small weights would not show."""
    found = list[Tensor]()
    modules = dict.fromkeys(matrix.module for matrix in parts.writers)
    handles = [
        block.get_submodule(path).register_forward_hook(lambda _module, _args, out: found.append(hidden_states(out)))
        for path in modules
    ]
    try:
        whole = run(block, states)
    finally:
        for handle in handles:
            handle.remove()
    return [*found, whole]


def _bias(block: nn.Module, matrix: Matrix) -> Tensor | None:
    name = f"{matrix.parameter}_bias" if matrix.experts else f"{matrix.name}.bias"
    return dict(block.named_parameters()).get(name)


def _behind_norms(block: nn.Module, parts: Residual) -> Iterator[_Site]:
    for norm, offset in parts.norms.items():
        read = [(name, name in parts.transposed) for name, of in parts.readers.items() if of == norm]
        if read:
            channels = block.get_submodule(norm).get_parameter("weight").numel()
            yield _Site(channels, 1, norm=norm, offset=offset, read=read)


def _behind_linears(block: nn.Module, parts: Residual, unchanged: Callable[[], bool]) -> Iterator[_Site]:
    """Of each writer of the stream, a product beside it whose outputs reach it in proportion.

    Found by trying: with rows divided and columns multiplied by numbers between a half and two, the block computes the
    same. So does `up` before `down` and not `gate`, behind whose activation a factor is another.
    """
    for down in parts.writers:
        parent = down.name.rpartition(".")[0]
        for up in products(block):
            fused, odd = divmod(up.outputs, down.inputs)
            if up == down or up.name.rpartition(".")[0] != parent or odd or up.experts != down.experts or fused > 3:
                continue
            sites = [
                _Site(
                    down.inputs,
                    max(1, down.experts),
                    writer=up,
                    rows=slice(part * down.inputs, (part + 1) * down.inputs),
                    read=[(down.parameter, down.transposed)],
                    watched=down,
                )
                for part in range(fused)
            ]
            if (site := next((site for site in sites if _proportional(block, site, unchanged)), None)) is not None:
                yield site
                break


def _proportional(block: nn.Module, site: _Site, unchanged: Callable[[], bool]) -> bool:
    assert site.writer is not None
    names = [site.writer.parameter, *(name for name, _ in site.read)]
    bias, before = _bias(block, site.writer), {name: block.get_parameter(name).clone() for name in names}
    bias_before = None if bias is None else bias.clone()
    device, generator = before[names[0]].device, torch.Generator().manual_seed(0)
    site.divide(
        block, (2 * torch.rand(site.experts, site.channels, generator=generator) - 1).exp2().double().to(device)
    )
    found = unchanged()
    for name, value in before.items():
        block.get_parameter(name).copy_(value)
    if bias is not None and bias_before is not None:
        bias.copy_(bias_before)
    return found


@contextmanager
def _watched(block: nn.Module, sites: list[_Site], *, moments: bool) -> Iterator[None]:
    """Within, each site sees what the block's run puts into its channels."""
    handles, by_matrix = list[Any](), {site.watched: site for site in sites if site.watched is not None}
    for site in sites:
        site.begin(next(block.parameters()).device, moments=moments)
        if site.norm:
            module = block.get_submodule(site.norm)
            handles.append(module.register_forward_hook(lambda _module, _args, out, site=site: site.see(0, out)))
    try:
        with seen(block, by_matrix, lambda matrix, expert, x: by_matrix[matrix].see(expert, x)):
            yield
    finally:
        for handle in handles:
            handle.remove()

"""Solved blocks on disk: one safetensors file each, written when the block is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upq.core.act_scheme import ActScheme
from upq.core.levels import Uniform
from upq.core.scheme import QTensor, QuantScheme
from upq.files.atomic import write_errors
from upq.files.tensors import keys_required, load_metadata, load_tensors, save_tensors
from upq.grids import GRIDS, OUTER, Params
from upq.kernels.reference import unpack
from upq.nn.fake_quant import Solution
from upq.nn.fixed_codes import Coded, Start

_PARAM = "param:"  # and the grid's name of it

# By name of a weight: its figures, and of experts those that no calibration token reached.
Report = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class BlockStore:
    """The blocks of one stage. Without `latents` a block comes back as its codes say: enough to build upon.

    Or to train scales of, which is why the grid's parameters are kept either way.
    """

    folder: Path
    scheme: QuantScheme
    latents: bool = True
    widths: tuple[Mapping[str, int], ...] = ()  # by block and name, bits of weights that have another number
    activations: ActScheme | None = None  # of the linears' inputs
    kv: ActScheme | None = None  # of keys and values

    def widths_of(self, index: int) -> Mapping[str, int]:
        return self.widths[index] if self.widths else {}

    def scheme_of(self, index: int, name: str) -> QuantScheme:
        """Of a weight: the store's scheme with its own bits."""
        return replace(self.scheme, bits=self.widths_of(index).get(name, self.scheme.bits))

    def coded(self, index: int) -> dict[str, Coded]:
        """The linears of a block as codes, whatever is kept of them."""
        return {
            name: solution if isinstance(solution, Coded) else Coded.of(solution.qtensor(), solution.params)
            for name, solution in self.solutions(index).items()
        }

    def path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def done(self, blocks: int) -> int:
        """How many blocks, from the first on, are on disk."""
        return next((i for i in range(blocks) if not self.path(i).is_file()), blocks)

    def save(
        self, index: int, solutions: Mapping[str, Start], report: Report, massive: Mapping[str, Any] | None = None
    ) -> None:
        tensors: dict[str, Tensor] = {}
        for name, solution in solutions.items():
            tensors |= {f"{name}:{_PARAM}{key}": value for key, value in solution.params.items()}
            if self.latents:
                assert isinstance(solution, Solution), "codes have no latents"
                tensors[f"{name}:latent"] = solution.latent_OI
            else:
                # Scales as they were computed: another device may round the parameters' exponential differently.
                q = solution.qtensor()
                coded = Coded.of(q, solution.params)
                tensors |= {f"{name}:packed": coded.packed_OB, f"{name}:columns": torch.tensor(coded.in_features)}
                tensors |= {f"{name}:{part}": value for part, value in _stored(q).items()}
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path(index), tensors, {"report": report, "massive": massive})

    def solutions(self, index: int) -> Mapping[str, Start]:
        """What each linear of a block trains from, by name."""
        parts = _by_linear(load_tensors(self.path(index))[0])
        with keys_required(self.path(index)):
            if self.latents:
                return {
                    name: Solution(part["latent"], _params(part), self.scheme_of(index, name))
                    for name, part in parts.items()
                }
            return {
                name: Coded(part["packed"], int(part["columns"]), _params(part), self.scheme_of(index, name))
                for name, part in parts.items()
            }

    def qtensors(self, index: int) -> dict[str, QTensor]:
        if self.latents:
            solutions = self.solutions(index)
            return {name: solution.qtensor() for name, solution in solutions.items()}
        parts = _by_linear(load_tensors(self.path(index))[0])
        with keys_required(self.path(index)):
            return {name: _qtensor(part, self.scheme_of(index, name)) for name, part in parts.items()}

    def weights(self, index: int) -> dict[str, Tensor]:
        """Dequantised weights (O, I) of a block's linears, float32."""
        return {name: q.dequantize() for name, q in self.qtensors(index).items()}

    def report(self, index: int) -> Report:
        """Linear name to its figures, as measured when the block was solved."""
        with keys_required(self.path(index)):
            report: Report = load_metadata(self.path(index))["report"]
        return report

    def input_scales(self, index: int) -> dict[str, float]:
        """By name, the scale of a linear's input, where activations are static."""
        if self.activations is None or not self.activations.static:
            return {}
        return {name: figures["input_scale"] for name, figures in self.report(index).items()}

    def massive(self, index: int) -> dict[str, Any] | None:
        """Of a block whose output has massive states (upq.blockwise._sinks): their tokens, weights and error."""
        found: dict[str, Any] | None = load_metadata(self.path(index)).get("massive")
        return found


def _stored(q: QTensor) -> dict[str, Tensor]:
    """What a QTensor has beside its codes."""
    found = {"scale": q.scale_OG} if q.outer_O1 is None else {"scale": q.scale_OG, OUTER: q.outer_O1}
    return found | ({"zero": q.zero_OG} if isinstance(q.levels, Uniform) else GRIDS.get(q.scheme.grid).store_levels(q))


def _qtensor(part: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
    grid, scale_OG = GRIDS.get(scheme.grid), part["scale"]
    levels = Uniform(part["zero"]) if grid.uniform else grid.load_levels(part, scale_OG, scheme)
    codes_OI = unpack(part["packed"], scheme.bits, int(part["columns"]))
    return QTensor(codes_OI, scale_OG, levels, scheme, part.get(OUTER))


def _params(part: dict[str, Tensor]) -> Params:
    return {key.removeprefix(_PARAM): value for key, value in part.items() if key.startswith(_PARAM)}


def _by_linear(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.partition(":")
        parts.setdefault(name, {})[part] = value
    return parts

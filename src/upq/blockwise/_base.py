"""What a method is given and what it gives back. Shape suffixes: N rows, T tokens, H hidden, O out, I in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from upq.blockwise._tokens import Tokens, tokens_of
from upq.core.processes import ALONE, Processes
from upq.core.registry import Registry
from upq.core.scheme import QuantScheme
from upq.grids import GRIDS, Grid, Params, search_scale
from upq.model.activations import Activations, batches
from upq.model.layout import fused_name
from upq.model.matrices import Matrix
from upq.model.products import seen
from upq.model.sizes import Bytes, Sizes
from upq.model.walker import Step
from upq.nn.fixed_codes import Start

ScaleStart = Literal["max", "mse", "hessian"]
ORIGINAL, QUANTISED = 0, 1  # the two streams of hidden states
# A search for the scales tries 62 ranges. Each moves 126 bytes a weight within the processor's caches, which takes the
# time of a quarter of them in memory.
SEARCH_BYTES = 62 * 126 / 4


@dataclass(frozen=True)
class BlockTask:
    """One decoder block to be quantised.

    `block` holds the weights that become codes: the original's, or the INT4 stage's. For methods that need no inputs,
    `step` has no streams. Where several processes share the calibration rows, the streams hold this one's rows alone,
    and each method here that speaks of all rows is to be called by every process.
    """

    step: Step
    block: nn.Module
    seed: int
    processes: Processes = ALONE
    widths: Mapping[str, int] = field(default_factory=dict)  # bits of weights that do not have the stage's
    warm: Mapping[str, Params] = field(default_factory=dict)  # grid parameters that an earlier window has learned
    # What the original's block reads, and the share of the steps in which the inputs go over from that to `inputs_NTH`.
    originals_NTH: Activations | None = None
    annealing: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)  # of a method's own objective, for the metrics

    @property
    def index(self) -> int:
        return self.step.index

    @property
    def inputs_NTH(self) -> Activations:
        """What this block will read: the output of the quantised blocks before it."""
        return self.step.states[QUANTISED]

    @property
    def targets_NTH(self) -> Activations:
        """What the original block writes behind the original blocks before it."""
        return self.step.states[ORIGINAL]

    def rows(self) -> int:
        """How many calibration rows there are, over all processes."""
        return int(self.processes.total(len(self.inputs_NTH)))

    @property
    def matrices(self) -> dict[str, Matrix]:
        """By name, the weights that become codes."""
        return {matrix.name: matrix for matrix in self.step.matrices}

    def weights(self) -> dict[str, Tensor]:
        """Weights (E·O, I) by name."""
        return {matrix.name: matrix.read(self.block) for matrix in self.step.matrices}

    def scheme(self, name: str, scheme: QuantScheme) -> QuantScheme:
        """The stage's `scheme`, with the bits of this weight."""
        return replace(scheme, bits=self.widths.get(name, scheme.bits))

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the weights in the order in which a forward pass of the block multiplies with them.

        Those of a group read the same tensor. One that the pass does not reach is a group at the end.
        """
        keys, held = dict[str, tuple[object, ...]](), list[Tensor]()

        def see(matrix: Matrix, _expert: int, x: Tensor) -> None:
            place = (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel())
            keys.setdefault(matrix.name, (matrix.name,) if matrix.experts else place)
            held.append(x)  # or its memory would be another's

        if len(self.inputs_NTH):
            with torch.no_grad(), seen(self.block, self.step.matrices, see):
                self.step.run(self.block, slice(0, 1), stream=QUANTISED)
        by_key = dict[tuple[object, ...], list[str]]()
        for name in (*keys, *(name for name in self.matrices if name not in keys)):
            by_key.setdefault(keys.get(name, (name,)), []).append(name)
        found = self.processes.text_of_first(json.dumps(list(by_key.values())))  # some may have no rows
        return tuple(tuple(group) for group in json.loads(found))

    @cached_property
    def tokens(self) -> Tokens:
        """What each token's error counts for. Every process must ask for it."""
        return tokens_of(self.targets_NTH, self.inputs_NTH, self.processes)

    def original_share(self, done: float) -> float:
        """Of the inputs, after this share of the steps: MREM's annealed teacher forcing (arXiv 2109.15082)."""
        return max(1 - done / self.annealing, 0.0) if self.annealing else 0.0

    def loss(
        self, weights: dict[str, Tensor], rows: Tensor | slice, *, relative: bool = False, original: float = 0.0
    ) -> Tensor:
        """Mean squared difference of the block's output with `weights` from the original block's; differentiable.

        Over `rows` of this process. `original`: the share of the original's states in the inputs.
        `relative`: each token's over its own size (Tokens), which is how the norms after
        it will see it; those with massive states count as much as all others.
        """
        hidden_BTH: Tensor | None = None
        if original:
            assert self.originals_NTH is not None
            hidden_BTH = self.inputs_NTH[rows].lerp(self.originals_NTH[rows], original)
        out_BTH = self.step.run(self.block, rows, weights=weights, stream=QUANTISED, hidden_BTH=hidden_BTH)
        squares_BTH = (out_BTH - self.targets_NTH[rows]).square()
        if not relative:
            return squares_BTH.mean()
        weights_BT = self.tokens.weights_NT[rows]
        return (squares_BTH.flatten(2).mean(-1) * weights_BT).mean()

    def batch_loss(
        self,
        weights: Callable[[], dict[str, Tensor]],
        index_B: Tensor,
        *,
        relative: bool = False,
        original: float = 0.0,
    ) -> Tensor | None:
        """This process's part of the `loss` of a batch, given by its indices among all rows; None where it has none.

        The parts of all processes, and so their gradients, add up to what a single one computes.
        """
        if relative:
            _ = self.tokens  # in processes without rows too
        mine_B = self.processes.mine(index_B)
        if not len(mine_B):
            return None
        return len(mine_B) / len(index_B) * self.loss(weights(), mine_B, relative=relative, original=original)

    def error(self, weights: dict[str, Tensor], *, relative: bool = False, batch_size: int = 8) -> float:
        """`loss` over all calibration rows."""
        if relative:
            _ = self.tokens  # in processes without rows too
        here = sum(
            self.loss(weights, rows, relative=relative).item() * (rows.stop - rows.start)
            for rows in batches(len(self.targets_NTH), batch_size)
        )
        return self.processes.total(float(here)) / self.rows()

    @torch.no_grad()
    def squares_here(self, weights: dict[str, Tensor], batch_size: int = 8) -> Tensor:
        """(2, 2) float64, over the rows of this process: sums of squares of the output's difference and of the target.

        Of tokens with massive states, then of all others. `tokens` is to be asked for before.
        """
        massive_NT, sums = self.tokens.massive_NT, torch.zeros(2, 2, dtype=torch.float64)
        for rows in batches(len(self.targets_NTH), batch_size):
            targets_BTH = self.targets_NTH[rows]
            out_BTH = self.step.run(self.block, rows, weights=weights, stream=QUANTISED)
            for column, states_BTH in enumerate((out_BTH - targets_BTH, targets_BTH)):
                squares_BT = states_BTH.flatten(2).square().sum(-1).double()
                for row, kind_BT in enumerate((massive_NT[rows], ~massive_NT[rows])):
                    sums[row, column] += squares_BT[kind_BT].sum().cpu()
        return sums

    @torch.no_grad()
    def second_moments(
        self, names: tuple[str, ...], *, full: bool, relative: bool = False, batch_size: int = 8
    ) -> dict[str, Tensor]:
        """E[x xᵀ] (I, I), or its diagonal E[x²] (I,), of what each weight in `names` reads on the quantised prefix.

        Over all calibration rows. Of experts (E, I, I) or (E, I), over the tokens that reached each: zeros where none
        did. `relative`: each token over its size (Tokens.relative_NT), except in experts.
        """
        relative_NT = self.tokens.relative_NT if relative else None
        weights_T1: Tensor | None = None
        wanted = [self.matrices[name] for name in names]
        moments = {m.name: self._no_moments(m, full=full) for m in wanted}

        def see(matrix: Matrix, expert: int, x: Tensor) -> None:
            x_TI = x.reshape(-1, x.shape[-1]).float()
            if weights_T1 is not None and not matrix.experts:
                x_TI = x_TI * weights_T1
            # The block runs under autocast. Rounded to bfloat16, E[x xᵀ] has negative eigenvalues: block 0 of
            # SmolLM2-135M could not be solved.
            with _float32(x.device):
                moments[matrix.name][expert] += x_TI.T @ x_TI if full else x_TI.square().sum(0)

        with seen(self.block, wanted, see):
            for rows in batches(len(self.inputs_NTH), batch_size):
                weights_T1 = None if relative_NT is None else relative_NT[rows].sqrt().reshape(-1, 1)
                self.step.run(self.block, rows, stream=QUANTISED)
        self.processes.sum(*moments.values())
        tokens = self.rows() * self.inputs_NTH.shape[1]
        return {m.name: (moments[m.name] if m.experts else moments[m.name][0]) / tokens for m in wanted}

    def _no_moments(self, matrix: Matrix, *, full: bool) -> Tensor:
        shape = (max(1, matrix.experts), *([matrix.inputs] * (2 if full else 1)))
        return torch.zeros(shape, device=self.block.get_parameter(matrix.parameter).device)

    def unreached(self) -> dict[str, tuple[int, ...]]:
        """By name of a tensor of experts, those that no calibration token reached."""
        names = tuple(matrix.name for matrix in self.step.matrices if matrix.experts)
        moments = self.second_moments(names, full=False) if names else {}
        found = {name: (~moment_EI.any(-1)).nonzero()[:, 0].tolist() for name, moment_EI in moments.items()}
        return {name: tuple(experts) for name, experts in found.items() if experts}


def _float32(device: torch.device) -> AbstractContextManager[object]:
    """Products within are not rounded, whatever autocast is around."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


@dataclass(frozen=True, slots=True)
class Calibration:
    """The rows of one process, and the type of a block's products."""

    rows: int
    tokens: int  # of a row
    bf16: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of products, and bytes that all other operations move."""

    flops: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.moved * times)


def pass_work(sizes: Sizes, calibration: Calibration, *, rows: int | None = None) -> Work:
    """One forward pass of a block, over `rows` or all."""
    count = calibration.rows if rows is None else rows
    probe = sizes.probe(bf16=calibration.bf16)
    # What is kept for backward has been written once and read once.
    return Work(probe.flops(count, calibration.tokens), 2 * probe.kept(count, calibration.tokens))


def start_memory(sizes: Sizes, calibration: Calibration, start: ScaleStart) -> Bytes:
    """Of `start_scales`: it goes over a weight by stretches of rows, and takes E[x²] from batches of 8 rows."""
    if start != "hessian":
        return Bytes()
    return sizes.forward(min(8, calibration.rows), calibration.tokens)


def start_work(sizes: Sizes, calibration: Calibration, start: ScaleStart) -> Work:
    if start == "max":
        return Work(0.0, 8.0 * sizes.linears)
    search = Work(0.0, SEARCH_BYTES * sizes.linears)
    return search + pass_work(sizes, calibration) if start == "hessian" else search


class Method(Protocol):
    """Law: on its own objective, never worse than nearest rounding from the same scale start."""

    Config: type[BaseModel]
    learns: ClassVar[bool] = False  # step by step on the block's output, so windows and annealed inputs matter
    between_levels: ClassVar[bool] = False  # it learns places between two levels that are one step apart
    vectors: ClassVar[bool] = False  # it solves grids of vectors (Grid.vectors), and no others

    def __init__(self, config: Any) -> None: ...

    @property
    def needs_inputs(self) -> bool: ...

    @property
    def cost(self) -> float:
        """Forward passes over the calibration set that solving one block is worth, for the estimate of time."""
        ...

    def memory(self, sizes: Sizes, calibration: Calibration) -> Bytes:
        """What `solve` holds at its peak, beside the block and the two streams of hidden states."""
        ...

    def work(self, sizes: Sizes, calibration: Calibration) -> Work:
        """What `solve` computes."""
        ...

    def solve(self, task: BlockTask, scheme: QuantScheme) -> Mapping[str, Start]:
        """A solution for each linear of the block: with latents, or of a grid of vectors the codes."""
        ...


METHODS: Registry[type[Method]] = Registry("upq.blockwise", "block-wise method")


def start_scales(
    task: BlockTask, scheme: QuantScheme, start: ScaleStart, *, relative: bool = False
) -> dict[str, Params]:
    """Grid parameters for each weight: its range, the search of least weight error, or weighed by E[x²].

    `relative`: of tokens as BlockTask.second_moments weighs them. Weights of experts that no token reached are not
    weighed. Weights that an earlier window has solved keep what it found.
    """
    weights, grid = task.weights(), GRIDS.get(scheme.grid)
    if task.warm:
        fresh = replace(task, warm={})
        rest = {} if task.warm.keys() == weights.keys() else start_scales(fresh, scheme, start, relative=relative)
        clones = {name: {key: value.clone() for key, value in each.items()} for name, each in task.warm.items()}
        return {name: clones.get(name) or rest[name] for name in weights}
    grids = _settled(grid, weights)
    if start == "max":
        return {name: grids[name].init(w_OI, task.scheme(name, scheme)) for name, w_OI in weights.items()}
    moments: dict[str, Tensor] = {}
    if start == "hessian":
        moments = task.second_moments(tuple(weights), full=False, relative=relative)
    found = dict[str, Params]()
    for name, w_OI in weights.items():
        moment, experts, own = moments.get(name), task.matrices[name].experts, task.scheme(name, scheme)
        if moment is None:
            found[name] = search_scale(w_OI, own, grid=grids[name])
            continue
        parts = [
            search_scale(w_OI, own, moment_I if moment_I.any() else None, grid=grids[name])
            for w_OI, moment_I in zip(w_OI.chunk(max(1, experts)), moment if experts else moment[None], strict=True)
        ]
        found[name] = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return found


def _settled(grid: Grid, weights: Mapping[str, Tensor]) -> dict[str, Grid]:
    """The grid for each weight, settled together for those that engines keep in one matrix."""
    fused = dict[str, list[Tensor]]()
    for name, w_OI in weights.items():
        fused.setdefault(fused_name(name) or name, []).append(w_OI)
    settled = {name: grid.settled(group) for name, group in fused.items()}
    return {name: settled[fused_name(name) or name] for name in weights}


def shuffled_batches(rows: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of row indices: shuffled epochs, a pure function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(rows, generator=generator)])
        yield order[:size]
        order = order[size:]

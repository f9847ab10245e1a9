"""AQLM (arXiv 2401.06118): code books by k-means, a beam search for the codes, and books and scales that learn.

Weight by weight against the Hessian of its inputs (_books.py), in the order of the block's products, as GPTQ; then all
books and scales of the block together against its original output. Codes stay in that last step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from upq.blockwise._base import METHODS, BlockTask, Calibration, Method, Work, pass_work
from upq.blockwise._books import fit
from upq.blockwise._reconstruct import Groups, reconstruct, reconstruct_memory, reconstruct_work
from upq.core.config import Strict
from upq.core.scheme import QuantScheme
from upq.grids import GRIDS
from upq.kernels.reference import pack
from upq.model.sizes import FP32, Bytes, Sizes, largest, tensors
from upq.nn.fixed_codes import Coded, Start

_DISTANCES = 2.0 * 256  # operations a weight of a search in one book of 256 rows


@METHODS.register("aqlm")
class Aqlm(Method):
    class Config(Strict):
        relative: bool = False  # each token's error over its output's own size
        damp: float = Field(0.01, ge=0)  # added to the Hessian's diagonal, as a share of its mean
        beam: int = Field(1, ge=1)  # combinations of rows that the search for a vector's codes keeps
        rounds: int = Field(20, ge=0)  # of books, scales and codes in turn, at most
        tolerance: float = Field(0.01, ge=0, lt=1)  # a round that lowers the objective by a smaller share is the last
        book_steps: int = Field(10, ge=1)  # of conjugate gradients on the books, in each round
        iterations: int = Field(400, ge=0)  # of the block's fine-tuning; 0: none
        batch_size: int = Field(4, ge=1)
        lr: float = Field(3e-3, gt=0)  # of the books, in units of a row's RMS, and of log scales
        final_lr: float = Field(0.0, ge=0, le=1)  # where the cosine ends, as a share of the rate

    needs_inputs = True
    vectors = True

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def cost(self) -> float:
        return 6.0 + 3.0 * self.config.iterations * self.config.batch_size

    def memory(self, sizes: Sizes, calibration: Calibration) -> Bytes:
        # Of the largest weight: itself, its error and its product with the Hessian, and what a search has of them.
        fitting = tensors(3, FP32 * max(sizes.inputs) ** 2) + tensors(6, FP32 * sizes.largest)
        learning = reconstruct_memory(
            sizes,
            calibration,
            batch_size=self.config.batch_size,
            iterations=self.config.iterations,
            weights_kept=1,
        )
        passing = sizes.forward(min(8, calibration.rows), calibration.tokens)
        return sizes.matrices() + largest(fitting + passing, learning)

    def work(self, sizes: Sizes, calibration: Calibration) -> Work:
        tokens = calibration.rows * calibration.tokens
        hessians = Work(sum(2.0 * tokens * i**2 for i in sizes.inputs))
        products = sum(2.0 * o * i**2 for o, i in sizes.shapes)
        a_round = products * (self.config.book_steps + 3) + _DISTANCES * 2 * self.config.beam * sizes.linears
        start = 2 * 100 * _DISTANCES * sizes.linears  # k-means
        fitted = Work(start + self.config.rounds * a_round, 200.0 * self.config.rounds * sizes.linears)
        total = pass_work(sizes, calibration) * len(sizes.inputs) + hessians + fitted
        if not self.config.iterations:
            return total
        return total + reconstruct_work(
            sizes, calibration, batch_size=self.config.batch_size, iterations=self.config.iterations, moved=60
        )

    def solve(self, task: BlockTask, scheme: QuantScheme) -> Mapping[str, Start]:
        found = self._fitted(task, scheme)
        return self._tuned(task, found) if self.config.iterations else found

    def _fitted(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Coded]:
        """Each weight by itself. The block is left with what they are now."""
        config, original, found = self.config, task.weights(), dict[str, Coded]()
        for group in task.groups():
            # The groups before this one are already codes in the block, so their error is part of the input.
            h_II = task.second_moments(group[:1], full=True, relative=config.relative)[group[0]]
            h_II = h_II + config.damp * h_II.diagonal().mean() * torch.eye(len(h_II), device=h_II.device)
            for name in group:
                codes_OI, params, _ = fit(
                    original[name],
                    h_II,
                    own := task.scheme(name, scheme),
                    beam=config.beam,
                    rounds=config.rounds,
                    tolerance=config.tolerance,
                    steps=config.book_steps,
                    seed=task.seed,
                )
                found[name] = Coded(pack(codes_OI, own.bits), codes_OI.shape[1], params, own)
                task.matrices[name].write(task.block, found[name].qtensor().dequantize())
        return {name: found[name] for name in original}

    def _tuned(self, task: BlockTask, found: Mapping[str, Coded]) -> dict[str, Coded]:
        codes = {name: coded.qtensor().codes_OI for name, coded in found.items()}
        params = {name: {k: v.clone().requires_grad_() for k, v in c.params.items()} for name, c in found.items()}

        def quantised() -> dict[str, Tensor]:
            weights = dict[str, Tensor]()
            for name, coded in found.items():
                scale_O1, levels = GRIDS.get(coded.scheme.grid).scale_and_levels(params[name], coded.scheme)
                weights[name] = levels.of(codes[name][:, None])[:, 0] * scale_O1
            return weights

        groups: Groups = [{"params": [p for each in params.values() for p in each.values()], "lr": self.config.lr}]
        reconstruct(
            task,
            quantised,
            groups,
            relative=self.config.relative,
            iterations=self.config.iterations,
            batch_size=self.config.batch_size,
            final_lr=self.config.final_lr,
        )
        return {
            name: Coded(c.packed_OB, c.in_features, {k: v.detach() for k, v in params[name].items()}, c.scheme)
            for name, c in found.items()
        }

"""Codes that stay while scales learn: 2 bits a weight in memory, where a latent with its moments takes 16 bytes.

End-to-end training of the quantisation parameters, as in EfficientQAT (arXiv 2407.11062, section 3.3), of any grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upq.core.scheme import QTensor, QuantScheme
from upq.grids import GRIDS, Params
from upq.kernels.reference import pack, unpack
from upq.nn.fake_quant import Solution
from upq.nn.trained import ALL, TrainedLinear, full_tensor


@dataclass(frozen=True)
class Coded:
    """A quantised linear without latents: packed codes (O, B), and the parameters (O, G) that scale them."""

    packed_OB: Tensor
    in_features: int
    params: Params
    scheme: QuantScheme

    @classmethod
    def of(cls, q: QTensor, params: Params) -> Coded:
        """`params` are those that the grid froze `q` with."""
        return cls(pack(q.codes_OI, q.scheme.bits), q.codes_OI.shape[1], params, q.scheme)

    def qtensor(self) -> QTensor:
        codes_OI = unpack(self.packed_OB, self.scheme.bits, self.in_features)
        return GRIDS.get(self.scheme.grid).qtensor(codes_OI, self.params, self.scheme)

    def layer(self, bias_O: Tensor | None, device: torch.device) -> FixedCodesLinear:
        """The linear that trains from here."""
        return FixedCodesLinear(self, bias_O, device)


Start = Solution | Coded  # what a linear trains from


class FixedCodesLinear(TrainedLinear):
    """`Ŵ = level(code) · scale`. Of the codes nothing learns.

    Law (tests/test_fixed_codes.py): output and gradients of the grid's parameters are those of the plain form, and
    what it starts from is what it was frozen from, bit for bit.
    """

    def __init__(self, coded: Coded, bias_O: Tensor | None, device: torch.device) -> None:
        super().__init__(coded.params, coded.scheme, bias_O, device)
        self.in_features = coded.in_features
        # A parameter and not a buffer: FSDP cuts it, DDP does not send it anew at every step, no checkpoint holds it.
        self.packed = nn.Parameter(coded.packed_OB.to(device), requires_grad=False)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), self.in_features

    def solution(self) -> Coded:
        return Coded(full_tensor(self.packed.detach()), self.in_features, self._whole_params(), self.scheme)

    def _learned(self) -> dict[str, Tensor]:
        return dict(self.grid_params)

    def _weight(self, learned: dict[str, Tensor], rows: slice = ALL) -> Tensor:
        scale_OG, levels = GRIDS.get(self.scheme.grid).scale_and_levels(learned, self.scheme)
        codes_OI = unpack(self.packed[rows], self.scheme.bits, self.in_features)
        # In place as far as autograd allows: the largest matrix of an 8B is 235 MB in float32.
        levels_OGS = levels.of(codes_OI.view(*scale_OG.shape, -1))
        scale_OG1 = scale_OG[..., None]
        weight_OGS = levels_OGS * scale_OG1 if torch.is_grad_enabled() else levels_OGS.mul_(scale_OG1)
        return weight_OGS.view_as(codes_OI)

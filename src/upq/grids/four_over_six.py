"""Four over six (arXiv 2512.02010): NVFP4 whose largest weight becomes level 6 or level 4, group by group.

Between 4 and 6 there is no level. A group whose large weights lie there does better with its largest at 4. What is
stored is NVFP4, and the search of `nvfp4` has both scales among its candidates: this is the choice without a search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from upq.core.scheme import QuantScheme
from upq.grids._base import GRIDS, Params
from upq.grids.nvfp4 import Nvfp4


@dataclass(frozen=True)
class FourOverSix(Nvfp4):
    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        six = super().init(w_OI, scheme)
        four = six | {"log_scale": six["log_scale"] + math.log(6 / 4)}
        everywhere_I = torch.ones(w_OI.shape[1], device=w_OI.device)
        return self._best(w_OI.detach().float(), (six, four), scheme, everywhere_I)


GRIDS.register("four_over_six")(FourOverSix())

"""The canonical layout: the state of a PackedLinear (version 1).

    weight_packed  uint8 (O, ceil(I·bits/8))  each row a little-endian bit stream of codes, the last byte zero-filled
    weight_scale   scale_dtype (O, G)
    weight_zero    scale_dtype (O, G)         only for grids whose groups have their own zero point

Nothing else is stored: widths and grid are in the scheme, constant zero points in the grid.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.scheme import QTensor, QuantScheme
from upq.formats._base import FORMATS
from upq.nn.packed import PackedLinear


class Upq:
    def supports(self, scheme: QuantScheme) -> bool:
        return True

    def encode(self, q: QTensor) -> dict[str, Tensor]:
        return dict(PackedLinear.from_qtensor(q).state_dict())

    def decode(self, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]) -> QTensor:
        with torch.device("meta"):
            layer = PackedLinear(shape[1], shape[0], scheme)
        wanted = layer.state_dict()
        for name, want in wanted.items():
            got = tensors.get(name)
            if got is None or got.shape != want.shape or got.dtype != want.dtype:
                found = "nothing" if got is None else f"{got.dtype} {tuple(got.shape)}"
                raise UPQError(f"{name}: expected {want.dtype} {tuple(want.shape)} for {scheme}, found {found}")
        layer.load_state_dict({name: tensors[name] for name in wanted}, assign=True)
        return layer.qtensor()


FORMATS.register("upq")(Upq())

"""The scheme of a quantised activation: numbers of few bits, and what shares a scale."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from upq.core.config import Strict


class ActScheme(Strict):
    """Frozen and hashable; written verbatim to an artefact's config.

    `per`: one scale for all values (tensor), for a token's (token), or for each `group_size` of a token's channels. Of
    keys and values a token is one head's vector.
    """

    bits: int = Field(default=8, ge=2, le=8)
    kind: Literal["int", "fp4", "fp8"] = "int"  # fp4: E2M1; fp8: E4M3
    per: Literal["tensor", "token", "group"] = "token"
    group_size: int | None = Field(default=None, ge=1)
    symmetric: bool = True  # False: int alone, with a zero point
    # The type of scales that are computed anew for each token; e8m0: a power of two, as in MXFP4.
    scale_dtype: Literal["float32", "e8m0"] = "float32"
    static: bool = False  # one scale, from the calibration rows; False: from the values themselves
    clip: float = Field(default=1.0, gt=0, le=1)  # share of the range that is kept

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        width = {"int": self.bits, "fp4": 4, "fp8": 8}[self.kind]
        if self.bits != width:
            raise ValueError(f"kind={self.kind} has {width} bits; set bits={width}")
        if (self.per == "group") != (self.group_size is not None):
            raise ValueError("group_size belongs to per=group, which needs it")
        if self.kind != "int" and not self.symmetric:
            raise ValueError(f"kind={self.kind} has no zero point; set symmetric=true")
        if self.static and (self.per != "tensor" or not self.symmetric or self.scale_dtype != "float32"):
            raise ValueError("static needs per=tensor, symmetric=true and scale_dtype=float32")
        return self

    @property
    def of_kernel(self) -> bool:
        """Whether the CPU kernel w2a8 rounds its inputs so by itself, bit for bit."""
        return self == ActScheme()

    def __str__(self) -> str:
        per = f"{self.per} of {self.group_size}" if self.group_size else self.per
        return f"{self.kind}{self.bits} per {per}" + ("" if self.symmetric else ", with a zero point")

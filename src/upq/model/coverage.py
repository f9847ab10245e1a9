"""How much of a model becomes codes, and why the rest does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from upq.core.errors import UPQError
from upq.model.layout import Layout, block_list, layout_of, shared_weights
from upq.model.matrices import left_out
from upq.model.matrices import matrices as matrices_of

LEAST = 0.9  # of the weights in the decoder's blocks: a run that quantises less asks first


@dataclass(frozen=True, slots=True)
class Coverage:
    """Counts of weight matrices (each expert's is one) and of weights. Vectors, as in norms, count as weights alone."""

    matrices: int  # that become codes
    all_matrices: int
    coded: int  # weights of these matrices
    in_blocks: int  # weights of the decoder's blocks
    in_model: int
    left: dict[str, int] = field(default_factory=dict)  # reason: weights that stay as they are
    left_in_blocks: dict[str, int] = field(default_factory=dict)  # of these, in the decoder's blocks

    @property
    def share(self) -> float:
        """Of the weights in the decoder's blocks."""
        return self.coded / self.in_blocks

    def text(self, bits: int) -> str:
        """In a sentence or two."""
        of_all = 100 * self.coded / self.in_model
        said = (
            f"{self.matrices:,} of {self.all_matrices:,} weight matrices, {of_all:.1f} % of all weights "
            f"({100 * self.share:.1f} % of the decoder blocks'), become {bits}-bit"
        )
        if not self.left:
            return said
        return f"{said}; left as they are: {_list(self.left)}"

    def check(self, name: str, *, allow_partial: bool) -> None:
        """Raises UPQError where much of the decoder would stay as it is, and nobody has said that it may."""
        if self.share >= LEAST or allow_partial:
            return
        raise UPQError(
            f"{name}: {100 * self.share:.0f} % of the weights in its decoder blocks can become codes; left would be "
            f"{_list(self.left_in_blocks)}; give --allow-partial to go on"
        )


def coverage(model: PreTrainedModel) -> Coverage:
    """Of a model, which may be without memory."""
    layout, shared = layout_of(model), shared_weights(model)
    coding, reasons, matrices, coded = set[str](), dict[str, str](), 0, 0
    for index, block in enumerate(block_list(model, layout)):
        start = f"{layout.blocks}.{index}."
        reasons |= {start + name: reason for name, reason in left_out(block).items()}
        for matrix in matrices_of(block):
            if start + matrix.parameter not in shared:
                coding.add(start + matrix.parameter)
                matrices += max(1, matrix.experts)
                coded += matrix.rows * matrix.inputs
    kept, in_blocks, in_model = 0, 0, 0
    left, of_blocks = Counter[str](), Counter[str]()
    tied, counted = model.all_tied_weights_keys, set[str]()
    for name, parameter in model.named_parameters():
        if (once := tied.get(name, name)) in counted:  # without memory, what is tied is there twice
            continue
        counted.add(once)
        inside = name.startswith(f"{layout.blocks}.")
        in_model += parameter.numel()
        in_blocks += parameter.numel() if inside else 0
        if name in coding:
            continue
        kept += parameter.dim() == 2
        reason = _reason(name, parameter, layout, reasons, shared)
        left[reason] += parameter.numel()
        if inside:
            of_blocks[reason] += parameter.numel()
    return Coverage(
        matrices, matrices + kept, coded, in_blocks, in_model, dict(left.most_common()), dict(of_blocks.most_common())
    )


def _reason(name: str, parameter: nn.Parameter, layout: Layout, reasons: dict[str, str], shared: frozenset[str]) -> str:
    if name.startswith(f"{layout.blocks}."):
        if parameter.dim() < 2:
            return "norms and other vectors"
        return reasons.get(name, "shared by several blocks" if name in shared else "other parameters")
    if name.startswith((f"{layout.embedding}.", f"{layout.head}.")):
        return "embedding and head"
    if not name.startswith(f"{layout.decoder}."):
        return "towers and heads beside the decoder"
    return "norms and other vectors" if parameter.dim() < 2 else "parts of the decoder outside its blocks"


def _list(left: dict[str, int]) -> str:
    return ", ".join(f"{reason} {_short(weights)}" for reason, weights in left.items())


def _short(weights: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if weights >= size:
            return f"{weights / size:.3g} {unit}"
    return str(weights)

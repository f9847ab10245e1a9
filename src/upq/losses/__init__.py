"""Training losses on logits, summed over the tokens of a mask. One file each."""

from upq.losses._base import LOSSES, Loss, ValueAndGrad

__all__ = ["LOSSES", "Loss", "ValueAndGrad"]

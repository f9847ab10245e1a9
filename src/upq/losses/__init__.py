"""Training losses on logits, summed over the tokens of a mask. One file each."""

from upq.losses._base import LOSSES, Divergence, Loss, ValueAndGrad, log_softmax
from upq.losses._top_k import TopK

__all__ = ["LOSSES", "Divergence", "Loss", "TopK", "ValueAndGrad", "log_softmax"]

"""Settings of the training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from upq.core.config import Plugin, Strict, free, neutral
from upq.core.precision import Precision


class TrainingSettings(Strict):
    """What every training from the original has."""

    loss: Plugin
    hidden: float = Field(0.0, ge=0)  # weight of the hidden states' relative error beside the loss
    teacher: Literal["resident", "offloaded", "cached"] = "resident"  # in memory, read block by block, or its top k
    batch_size: int = Field(16, ge=1)  # sequences an optimiser step, over all processes
    micro_batch_size: int = Field(4, ge=1)  # sequences a forward pass on one process
    # Of the weights, in units of each matrix's RMS: 5e-3 moves a weight of 0.02 by 1e-4 a step. None: by the width.
    lr: float | None = Field(None, gt=0)
    scale_lr: float = Field(gt=0)  # of the grid's own parameters, of log Δ, and of norms in units of their RMS
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps
    final_lr: float = Field(0.0, ge=0, le=1)  # where the cosine ends, as a share of lr
    weight_decay: float = Field(0.0, ge=0)
    beta2: float = Field(0.95, gt=0, lt=1)
    clip: float = Field(1.0, gt=0)  # gradient norm
    train_weights: bool = True  # False: codes stay as the block-wise stage has left them, and scales alone learn
    train_zeros: bool = neutral(True)  # False: zero points keep the values that the block-wise stage has stored
    train_norms: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # moments in float32, or in 8 bits (torchao)
    gradient_checkpointing: bool = free(False)  # keep the blocks' inputs for the backward pass and run each block again
    precision: Precision = "auto"  # of the products; what is learned is float32
    # nvfp4: the linears' products of the backward pass on rounded operands, without bias (upq.nn.ms_eden). Emulated.
    backward: Literal["nvfp4"] | None = neutral(None)
    chunk_tokens: int = Field(1024, ge=1)  # tokens whose fp32 logits exist at one time
    checkpoint_every: int = Field(50, ge=1)  # optimiser steps
    skip_bad_steps: int = free(0, ge=0)  # as many whose loss or gradient is not finite are left out; one more stops

    def learning_rate(self, width: int) -> float:
        """`lr`; where none is given, 1e-3 falling with the square of the hidden size `width` to 2e-4.

        Two sizes were measured: at 256 (3.3M weights) 1e-3 is best. At 576 (SmolLM2-135M) 2e-4 is, and the first step
        at 1e-3 doubles the loss that the block-wise stage has left (docs/log/real-models.md).
        """
        if self.lr is not None:
            return self.lr
        return max(2e-4, 1e-3 * min(1.0, 256 / width) ** 2)


class Distill(TrainingSettings):
    """A training on packed text."""

    teacher_top_k: int = Field(64, ge=1)  # cached: tokens kept a position; the rest counts as one
    tokens: int = Field(ge=0)  # budget; 0 skips the training
    seq_len: int | None = neutral(None, ge=8)  # tokens of a row; None: data.seq_len

"""HQQ (half-quadratic quantisation): no calibration text; zero points of the groups are fitted to the weights alone."""

from __future__ import annotations

import peer
import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from torch import Tensor, nn

COMPUTE = torch.float16  # quantize_model's own default; scales and zero points are stored in it


def quantise(job: peer.Job) -> str:
    group_size = None if job.group_size == -1 else job.group_size
    config = BaseQuantizeConfig(nbits=peer.BITS, group_size=group_size, axis=axis(job))
    model = peer.load_original(job)
    AutoHQQHFModel.quantize_model(model, config, compute_dtype=COMPUTE, device="cpu")
    job.stored.mkdir()
    AutoHQQHFModel.save_quantized(model, str(job.stored))
    return f"BaseQuantizeConfig(nbits=2, group_size={group_size}, axis={axis(job)}), no calibration text"


def load(job: peer.Job) -> nn.Module:
    return AutoHQQHFModel.from_quantized(str(job.stored), compute_dtype=COMPUTE, device="cpu")


def groups(job: peer.Job, weight_OI: Tensor) -> Tensor:
    """HQQ's own grouping, a group a row: it cuts the flat matrix, so groups run on from row to row or across rows."""
    if job.group_size != -1:
        weight_OI = weight_OI.reshape((-1, job.group_size) if axis(job) == 1 else (job.group_size, -1))
    return weight_OI if axis(job) == 1 else weight_OI.T


def axis(job: peer.Job) -> int:
    return int(job.variant.removeprefix("axis="))


if __name__ == "__main__":
    peer.run("hqq", quantise, load, groups)

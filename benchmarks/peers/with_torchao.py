"""torchao: IntxWeightOnlyConfig, its only weight-only config that takes 2 bits (UIntxWeightOnlyConfig: 4 and 8)."""

from __future__ import annotations

import peer
import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_


def quantise(job: peer.Job) -> str:
    granularity = PerAxis(0) if job.group_size == -1 else PerGroup(job.group_size)
    config = IntxWeightOnlyConfig(torch.int2, granularity, intx_choose_qparams_algorithm=job.variant)
    model = peer.load_original(job)
    linears = set(peer.block_linears(model).values())
    quantize_(model, config, filter_fn=lambda module, _: module in linears)
    job.stored.mkdir()
    torch.save(model.state_dict(), job.stored / "model.pt")
    return f"IntxWeightOnlyConfig(torch.int2, {granularity}, {job.variant}), no calibration text"


def load(job: peer.Job) -> nn.Module:
    model = peer.load_original(job)
    model.load_state_dict(torch.load(job.stored / "model.pt", weights_only=True), assign=True)
    return model


if __name__ == "__main__":
    peer.run("torchao", quantise, load)

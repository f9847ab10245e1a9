"""GPTQModel: GPTQ with group-aware reordering, saved in its own GPTQ layout."""

from __future__ import annotations

import os

# Its pool has (cores + 1) // 2 workers and its own loader asks for two of them: on two cores that is "Virtual pool
# 'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1". Read when the package is imported.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import peer
from gptqmodel import BACKEND, GPTQConfig, GPTQModel
from torch import nn

SAMPLES = 1024  # as in its readme


def quantise(job: peer.Job) -> str:
    # Its defaults: damping 0.05, group-aware reordering (which "requires `group_size > 0`": without groups, plain
    # activation order costs nothing).
    grouped = job.group_size > 0
    config = GPTQConfig(
        bits=peer.BITS,
        group_size=job.group_size,
        sym=job.variant == "symmetric",
        act_group_aware=grouped,
        desc_act=not grouped,
        device="cpu",
    )
    tokens_NT = job.calibration(SAMPLES)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens_NT.tolist()]
    model = GPTQModel.load(str(job.model), config)
    model.quantize(rows, batch_size=1)
    model.save(str(job.stored))
    order = "act_group_aware" if grouped else "desc_act"
    return f"GPTQConfig, {job.variant}, {order}, damp_percent {config.damp_percent}, {len(rows)} rows"


def load(job: peer.Job) -> nn.Module:
    return GPTQModel.load(str(job.stored), device="cpu", backend=BACKEND.GPTQ_TORCH).model


if __name__ == "__main__":
    peer.run("gptqmodel", quantise, load)

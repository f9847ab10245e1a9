"""AutoRound: rounding and clipping learnt block by block with signed gradients, saved in its own layout."""

from __future__ import annotations

import peer
from auto_round import AutoRound
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

# "We recommend ... auto-round-best with enable_alg_ext for W2A16" (its readme): the recipe is 512 rows, 1000 steps.
SAMPLES, ITERS, BATCH = 512, 1000, 8


def quantise(job: peer.Job) -> str:
    tokens_NT = job.calibration(SAMPLES)
    model = peer.load_original(job)
    rounder = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        scheme="W2A16",
        group_size=job.group_size,
        dataset=list(tokens_NT.split(BATCH)),
        nsamples=len(tokens_NT),
        seqlen=tokens_NT.shape[1],
        iters=ITERS,
        batch_size=BATCH,
        enable_alg_ext=True,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounder.quantize_and_save(str(job.stored), format="auto_round")
    return f"auto-round-best with enable_alg_ext: {ITERS} steps, {len(tokens_NT)} rows, symmetric"


def load(job: peer.Job) -> nn.Module:
    (folder,) = (file.parent for file in job.stored.rglob("config.json"))  # AutoRound makes a folder of its own
    return AutoModelForCausalLM.from_pretrained(folder)


if __name__ == "__main__":
    peer.run("auto-round", quantise, load)

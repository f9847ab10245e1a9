"""llm-compressor: GPTQ with static activation order, saved as compressed-tensors."""

from __future__ import annotations

import peer
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

SAMPLES = 512  # oneshot's own default; its examples use 512 as well


def quantise(job: peer.Job) -> str:
    per_channel = job.group_size == -1
    weights = QuantizationArgs(
        num_bits=peer.BITS,
        symmetric=job.variant != "asymmetric",
        strategy=QuantizationStrategy.CHANNEL if per_channel else QuantizationStrategy.GROUP,
        group_size=None if per_channel else job.group_size,
    )
    # block_size 128, dampening 0.01 and static activation order are GPTQModifier's defaults.
    modifier = GPTQModifier(
        config_groups={"blocks": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    tokens_NT = job.calibration(SAMPLES)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens_NT.tolist()]
    model = peer.load_original(job)
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifier,
        max_seq_length=tokens_NT.shape[1],
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(job.stored, save_compressed=True)
    return f"GPTQModifier, {job.variant}, actorder=static, dampening 0.01, {len(rows)} rows"


def load(job: peer.Job) -> nn.Module:
    config = CompressedTensorsConfig(run_compressed=False)  # dense, by compressed-tensors' own code
    return AutoModelForCausalLM.from_pretrained(job.stored, quantization_config=config)


if __name__ == "__main__":
    peer.run("llmcompressor", quantise, load)

"""AutoRound on the one-block model of benchmarks/blockwise.py. Runs in AutoRound's own environment.

    block_with_autoround.py FOLDER ITERATIONS BATCH_SIZE SEED AUTOCAST COMPILED

reads model/ and tokens.safetensors in FOLDER and leaves autoround.safetensors there, the weights (O, I) of the block's
linears as its checkpoint would hold them: codes of 4 bits times a float16 scale a row.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: Path, iterations: int, batch_size: int, seed: int, autocast: int, compiled: int) -> None:
    tokens_NT = load_file(folder / "tokens.safetensors")["tokens_NT"]
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16 if autocast else torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
        scheme="W4A16",
        group_size=-1,
        dataset=list(tokens_NT.split(batch_size)),
        nsamples=len(tokens_NT),
        seqlen=tokens_NT.shape[1],
        iters=iterations,
        batch_size=batch_size,
        seed=seed,
        amp=bool(autocast),
        device_map="cpu",
        enable_torch_compile=bool(compiled),
    )
    wall, cpu = time.monotonic(), time.process_time()
    model, _ = rounder.quantize()
    answer = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
    block = model.model.layers[0]
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    save_file({name: stored(module) for name, module in linears.items()}, folder / "autoround.safetensors")
    dtype = str(rounder.model_context.amp_dtype).removeprefix("torch.")
    settings = f"{version('auto-round')}, {dtype}, {'compiled' if compiled else 'not compiled'}"
    print(json.dumps({**answer, "settings": settings}))


def stored(linear: nn.Linear) -> Tensor:
    """The weight without the rounding to the type that AutoRound computed in."""
    scale_O1 = linear.scale.float()
    exact_OI = linear.weight.detach().float() / scale_O1
    codes_OI = exact_OI.round()
    assert (exact_OI - codes_OI).abs().max() < 0.1, "the weight is no multiple of its scale"
    assert codes_OI.min() >= -8
    assert codes_OI.max() <= 7
    return (codes_OI * scale_O1).contiguous()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

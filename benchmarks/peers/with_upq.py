"""UPQ itself and the original, through the same measurements as the peers. Runs in the project's own environment."""

from __future__ import annotations

import peer
from torch import nn

ORIGINAL = "original"
NO_TRAINING = ["int4=null", "distill.tokens=0"]
# Variant: recipe and overrides; a group size is added to them.
VARIANTS = {
    "nearest": ("paper", [*NO_TRAINING, "int2.grid=affine"]),
    "paper": ("paper", []),
    "default": ("default", []),
}


def quantise(job: peer.Job) -> str:
    from upq.data.config import TextSource
    from upq.model.loading import load_tokenizer
    from upq.run.recipe import Recipe
    from upq.run.run import quantize

    if job.variant == ORIGINAL:
        peer.load_original(job).save_pretrained(job.stored)
        return ""
    name, changes = VARIANTS[job.variant]
    overrides = [f"data.seq_len={job.seq_len}", *([f"distill.tokens={job.budget}"] if job.budget else []), *changes]
    if load_tokenizer(job.model).chat_template is None:
        overrides.append("data.generated=null")
    elif "generate" in Recipe.load(name).stages:
        overrides.append(f"data.generated={{max_new_tokens: {job.seq_len // 2}}}")
    if job.group_size != -1:
        overrides.append(f"int2.group_size={job.group_size}")
    recipe = Recipe.load(name, overrides)
    data = recipe.data.model_copy(update={"sources": (TextSource(path=str(job.text)),)})
    quantize(job.model, recipe.model_copy(update={"data": data}), job.stored, device="cpu")
    return " ".join([f"--recipe {name}", *(f"--set {override}" for override in overrides)])


def load(job: peer.Job) -> nn.Module:
    import upq
    from upq.kernels import set_compute

    set_compute("reference")  # the peers' weights are read off their products, exactly
    return upq.load(job.stored)


if __name__ == "__main__":
    peer.run("upq", quantise, load)

"""Writes docs/models.md: what becomes codes of each causal LM of transformers, and what stays as it is.

    python tools/models_page.py

Each type is built in its class's own default configuration, without memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers import __version__ as version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from upq.core.errors import UPQError  # noqa: E402
from upq.decoding import COMPILED  # noqa: E402
from upq.exports._decoder import LLAMA_BLOCKS as GRAPHS  # noqa: E402
from upq.model.coverage import coverage  # noqa: E402
from upq.model.layout import block_list  # noqa: E402
from upq.model.matrices import matrices  # noqa: E402
from zoo import CORE, MODELS, WRAPPERS  # noqa: E402

HEAD = f"""# Models

Written by `tools/models_page.py` from transformers {version}: every causal LM that its class builds without settings.
Shares are of the weights in the decoder's blocks, in that default configuration. Norms, biases, embeddings and heads
are never among them. Towers for images and sound stay as they are.

- **Decoder**: `compiled` generates on the CPU through UPQ's own decoder, all others through transformers' loop with the
  packed kernels.
- **Exports**: `all` is every format of [engines.md](engines.md). `linears` are the formats that are a checkpoint of
  linears (`dense`, `compressed_tensors`, `gptq`, `humming`, `torchao`): exact, not tried in engines. No export holds
  experts yet.
- **Tested**: `run` is a whole run of a tiny model (`tests/test_models.py`): quantised, trained, packed, loaded by
  `from_pretrained`. `layout`: every weight of its blocks has its place or its reason (`tests/test_layout.py`).

| type | becomes codes | stays, of the blocks' matrices | decoder | exports | tested |
|---|---:|---|---|---|---|
"""


def rows() -> Iterator[str]:
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
        except Exception:
            continue
        try:
            found = coverage(model)
        except UPQError:
            yield f"| {kind} | – | no list of gradient-checkpointing layers | – | – | refused |"
            continue
        reasons = [reason for reason in found.left_in_blocks if reason != "norms and other vectors"]
        weights = [weight for block in block_list(model) for weight in matrices(block)]
        plain = not any(weight.experts or weight.transposed for weight in weights)
        exports = "all" if kind in GRAPHS else "linears" if plain else "none"
        tested = "run" if kind in (*MODELS, *WRAPPERS) else "layout"
        decoder = "compiled" if kind in COMPILED else "transformers"
        left = ", ".join(reasons) or "nothing"
        yield f"| {kind} | {100 * found.share:.1f} % | {left} | {decoder} | {exports} | {tested} |"


def main() -> None:
    lines = list(rows())
    assert {*MODELS, *WRAPPERS} >= CORE
    (ROOT / "docs/models.md").write_text(HEAD + "\n".join(lines) + "\n")
    print(f"docs/models.md: {len(lines)} types")


if __name__ == "__main__":
    main()

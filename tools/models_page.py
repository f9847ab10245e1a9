"""Writes docs/models.md: what becomes codes of each causal LM of transformers, and what stays as it is.

    python tools/models_page.py

Each type is built in its class's own default configuration, without memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import CONFIG_MAPPING
from transformers import __version__ as version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from upq.core.errors import UPQError  # noqa: E402
from upq.decoding import LLAMA_BLOCKS  # noqa: E402
from upq.exports._decoder import LLAMA_BLOCKS as GRAPHS  # noqa: E402
from upq.model.coverage import coverage  # noqa: E402
from upq.model.source import Source  # noqa: E402
from zoo import CORE, MODELS, WRAPPERS  # noqa: E402

HEAD = f"""# Models

Written by `tools/models_page.py` from transformers {version}: every causal LM that its class builds without settings. Shares are of the weights
in the decoder's blocks, in that default configuration. Norms, biases, embeddings and heads are never among them; towers for images
and sound stay as they are.

- **Decoder**: `compiled` generates on the CPU through UPQ's own decoder; all others through transformers' loop with the packed kernels.
- **Exports**: `all` is every format of [engines.md](engines.md); `weights` are the formats that hold any linear, and `dense`.
  Experts are held by `dense` alone.
- **Tested**: `run` is a whole run of a tiny model (`tests/test_models.py`): quantised, trained, packed, loaded by `from_pretrained`;
  `layout` that every weight of its blocks has its place or its reason.

| type | becomes codes | stays, of the blocks' matrices | decoder | exports | tested |
|---|---:|---|---|---|---|
"""


def rows() -> Iterator[str]:
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            source = Source.without_files(CONFIG_MAPPING[kind]())
            found = coverage(source)
        except UPQError as error:
            if "no list of decoder blocks" in str(error):
                yield f"| {kind} | – | no list of gradient-checkpointing layers | – | – | refused |"
            continue
        except Exception:  # noqa: BLE001  (a class that has no default configuration)
            continue
        reasons = [reason for reason in found.left_in_blocks if reason != "norms and other vectors"]
        experts = any(matrix.experts for index in range(len(source)) for matrix in source.matrices(index))
        exports = "all" if kind in GRAPHS else "dense" if experts else "weights"
        tested = "run" if kind in (*MODELS, *WRAPPERS) else "layout"
        decoder = "compiled" if kind in LLAMA_BLOCKS else "transformers"
        left = ", ".join(reasons) or "nothing"
        yield f"| {kind} | {100 * found.share:.1f} % | {left} | {decoder} | {exports} | {tested} |"


def main() -> None:
    lines = list(rows())
    assert CORE <= {*MODELS, *WRAPPERS}
    (ROOT / "docs/models.md").write_text(HEAD + "\n".join(lines) + "\n")
    print(f"docs/models.md: {len(lines)} types")


if __name__ == "__main__":
    main()

"""Writes docs/models.md: what becomes codes of each causal LM of transformers, and what stays as it is.

    python tools/models_page.py

Each type is built in its class's own default configuration, without memory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers import __version__ as version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from upq.artifact.manifest import Manifest, SourceModel  # noqa: E402
from upq.core.errors import UPQError  # noqa: E402
from upq.core.scheme import QuantScheme  # noqa: E402
from upq.decoding import COMPILED  # noqa: E402
from upq.exports import EXPORTS, Source, Weight  # noqa: E402
from upq.exports._checkpoint import as_checkpoint, expert_by_expert  # noqa: E402
from upq.exports._decoder import LLAMA_BLOCKS as GRAPHS  # noqa: E402
from upq.exports._llamacpp import FAMILIES  # noqa: E402
from upq.model.coverage import coverage  # noqa: E402
from upq.model.layout import layout_of  # noqa: E402
from upq.model.loading import text_config  # noqa: E402
from upq.model.matrices import Matrix  # noqa: E402
from upq.nn.blocks import model_weights  # noqa: E402
from zoo import CORE, MODELS, WRAPPERS  # noqa: E402

EXPERTS = ("dense", "compressed_tensors", "gptq")
LINEARS = (*EXPERTS, "humming", "torchao")

HEAD = f"""# Models

Written by `tools/models_page.py` from transformers {version}: every causal LM that its class builds without settings.
Shares are of the weights in the decoder's blocks, in that default configuration. Norms, biases, embeddings and heads
are never among them. Towers for images and sound stay as they are.

- **Decoder**: `compiled` generates on the CPU through UPQ's own decoder, all others through transformers' loop with the
  packed kernels.
- **Exports**: `all` is every format of [engines.md](engines.md). `linears` are the formats that are a checkpoint of
  linears (`dense`, `compressed_tensors`, `gptq`, `humming`, `torchao`), `experts` those that hold an expert's linears
  one by one (`dense`, `compressed_tensors`, `gptq`). Exact; [engines.md](engines.md#families) says what was run. A
  format that cannot hold a family refuses it in one line before it writes.
- **Tested**: `run` is a whole run of a tiny model (`tests/test_models.py`): quantised, trained, packed, loaded by
  `from_pretrained`. `layout`: every weight of its blocks has its place or its reason (`tests/test_layout.py`).

| type | becomes codes | stays, of the blocks' matrices | decoder | exports | tested |
|---|---:|---|---|---|---|
"""


def held(model: PreTrainedModel) -> str:
    """The formats that hold the weights of the decoder's blocks, as groups where they are one."""
    plain = as_checkpoint(_one_of_each(model))
    apart = expert_by_expert(plain)
    names = []
    for name in LINEARS:
        weights = (apart if name == "compressed_tensors" else plain).weights.values()
        if {weight.form for weight in weights} <= EXPORTS.get(name).forms:
            names.append(name)
    if text_config(model.config).model_type in FAMILIES:
        names.append("gguf")
    for group, formats in (("linears", LINEARS), ("experts", EXPERTS)):
        if set(formats) <= set(names):
            names = [group, *(name for name in names if name not in formats)]
    return ", ".join(names)


def _one_of_each(model: PreTrainedModel) -> Source:
    """A source of the quantised weights of a model without memory, one of those that differ in their block alone."""
    layout, scheme, weights = layout_of(model), QuantScheme(bits=2), dict[str, Weight]()
    for path, matrix in model_weights(model).items():
        assert isinstance(matrix, Matrix)
        name = path if matrix.experts else f"{path}.weight"
        weights.setdefault(
            re.sub(r"\.\d+\.", ".", name, count=1),
            Weight(
                name=name,
                shape=matrix.shape,
                dtype=torch.float32,
                scheme=scheme,
                files={},
                dense=matrix.parameter_shape if matrix.experts or matrix.transposed else None,
                inputs=-2 if matrix.transposed else -1,
            ),
        )
    return Source(
        path=Path(),
        manifest=Manifest(model=SourceModel(path="", digest="")),
        config=model.config,
        layout=layout,
        dtype=torch.float32,
        model=model,
        weights={weight.name: weight for weight in weights.values()},
        linears=frozenset(),
    )


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
        exports = "all" if kind in GRAPHS else held(model)
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

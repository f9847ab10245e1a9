"""GPTQ: names and shapes by an engine's own schema, and the bytes. No engine runs it here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

import upq
from tiny import tiny_artifact
from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.exports import export

WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
PATH = "model.layers.0.self_attn.q_proj"


def exported(folder: Path, scheme: QuantScheme, **options: Any) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """An artefact, the config and the tensors of its export."""
    artifact = tiny_artifact(folder / "artifact", scheme=scheme, **{**WIDE, **options})
    assert export(artifact, "gptq", folder / "out").exact
    config = json.loads((folder / "out" / "config.json").read_text())
    return artifact, config["quantization_config"], load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("scheme", "bits", "sym"),
    [
        (QuantScheme(bits=2), 4, True),
        (QuantScheme(bits=2, group_size=32), 4, True),
        (QuantScheme(bits=2, grid="sym"), 2, True),
        (QuantScheme(bits=2, grid="q2_0"), 2, False),
        (QuantScheme(bits=2, grid="affine", group_size=32), 2, False),
        (QuantScheme(bits=3), 4, True),
        (QuantScheme(bits=4), 8, True),
        (QuantScheme(bits=4, grid="sym"), 4, True),
    ],
    ids=str,
)
def test_the_fewest_bits_are_taken(scheme: QuantScheme, bits: int, sym: bool, tmp_path: Path) -> None:
    """And (q - z)·s is the weight, computed here word by word from the layout's definition."""
    artifact, config, stored = exported(tmp_path, scheme)
    assert (config["bits"], config["sym"]) == (bits, sym)
    assert (config["checkpoint_format"], config["group_size"]) == ("gptq_v2", scheme.group_size)
    packed = upq.load(artifact).get_submodule(PATH)
    dense_OI, per_word, mask = packed.qtensor().dequantize(), 32 // bits, (1 << bits) - 1
    qweight, qzeros, scales, g_idx = (stored[f"{PATH}.{kind}"] for kind in ("qweight", "qzeros", "scales", "g_idx"))
    for n, k in ((0, 0), (1, 63), (17, 31), (63, 40)):
        group = int(g_idx[k])
        q = int(qweight[k // per_word, n]) >> bits * (k % per_word) & mask
        z = int(qzeros[group, n // per_word]) >> bits * (n % per_word) & mask
        assert (q - z) * scales[group, n].item() == dense_OI[n, k].item()
        assert not sym or z == 1 << (bits - 1)


def test_tensors_are_those_of_an_engines_own_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Humming reads GPTQ's files for vLLM; groups only, for it takes no group size of -1."""
    for module in ("humming.ops", "humming.device"):
        monkeypatch.setitem(sys.modules, module, MagicMock())
    schemas: Any = pytest.importorskip("humming.schema", reason="humming-kernels is not installed: make test-engines")
    _, config, stored = exported(tmp_path, QuantScheme(bits=2, grid="sym", group_size=32))
    schema = schemas.BaseWeightSchema.from_config(config)
    own = {key.removeprefix(f"{PATH}."): value for key, value in stored.items() if key.startswith(f"{PATH}.")}
    schema.validate_tensors(own, 64, 64, torch.float16)
    assert own.keys() == schema.get_tensors_attrs(64, 64, torch.float16).keys()


def test_linears_that_do_not_fit_are_dense_and_named(tmp_path: Path) -> None:
    """Rows of 100 four-bit codes are no whole words: down_proj reads them, gate and up make them."""
    _, config, stored = exported(tmp_path, QuantScheme(bits=2), intermediate_size=100)
    block = r"model\.layers\.0"
    assert rf"-:^{block}\.mlp\.down_proj$" in config["dynamic"]
    assert rf"-:^{block}\.mlp\.gate_up_proj$" in config["dynamic"]
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.float32
    assert f"{PATH}.qweight" in stored


def test_a_scale_that_float16_does_not_hold_is_refused(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", scheme=QuantScheme(bits=2, scale_dtype="float32"), **WIDE)
    with pytest.raises(UPQError, match=r"gptq cannot hold .* a scale has no exact place in float16"):
        export(artifact, "gptq", tmp_path / "out")

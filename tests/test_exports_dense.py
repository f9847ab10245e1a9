"""The dense export: an ordinary checkpoint with the logits of the packed model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import upq
from tiny import FAMILIES, tiny_artifact
from upq.exports import _directory as directory
from upq.exports import export

pytestmark = pytest.mark.usefixtures("reference")

IDS = torch.arange(2, 22).view(2, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_packed_model(family: str, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", family, dtype=torch.bfloat16, tie_word_embeddings=False)
    packed = upq.load(artifact)
    export(artifact, "dense", tmp_path / "auto")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "auto")
    assert plain.dtype == torch.bfloat16
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(plain(IDS).logits, packed(IDS).logits)
    export(artifact, "dense", tmp_path / "fp32", options={"dtype": "fp32"})
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")
    assert exact.dtype == torch.float32
    assert torch.equal(exact(IDS).logits, upq.load(artifact, dtype=torch.float32)(IDS).logits)


@pytest.mark.slow  # a Python without upq is a fresh one
def test_it_loads_and_talks_without_upq(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", embeddings_bits=4)
    export(artifact, "dense", tmp_path / "dense")
    code = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "dense")!r})
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "dense")!r})
ids = tokenizer.apply_chat_template([{{"role": "user", "content": "hi"}}], return_tensors="pt", return_dict=True)
print(model.generate(**ids, max_new_tokens=4).shape[1] - ids["input_ids"].shape[1])
assert not any(name.split(".")[0] == "upq" for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.strip() == "4"


def test_large_models_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_SHARD", 20_000)
    artifact = tiny_artifact(tmp_path / "artifact")
    export(artifact, "dense", tmp_path / "dense")
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "dense").glob("*.safetensors"))
    assert {file.name for file in shards} == set(index["weight_map"].values())
    assert len(shards) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(model(IDS).logits, upq.load(artifact)(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer.chat_template

"""Exports of other families than Llama's kin, with experts too: read by transformers, and by the rules of llama.cpp."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import upq
from tiny import CHAT, artifact_of_model, byte_tokenizer, tiny_artifact, tiny_model
from upq.core.errors import UPQError
from upq.exports import EXPORTS, Source, export
from zoo import MODELS, random_model

pytestmark = pytest.mark.usefixtures("reference")

IDS = torch.arange(2, 22).view(2, 10)
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": False}
SCALES = {
    "attention_multiplier": 0.25, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
}  # fmt: skip
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artefacts by family, each made once: of two blocks, every linear a multiple of 32 wide."""
    made: dict[str, Path] = {}

    def artifact(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items(), key=str)}"
        if key not in made:
            known: dict[str, Any] = EXPERTS if family in ("qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe") else {}
            own = {"norm_topk_prob": True} if family == "qwen3_moe" else {}
            own |= {"query_pre_attn_scalar": 16} if family == "gemma3_text" else {}
            own |= SCALES if family == "granite" else {}
            made[key] = tiny_artifact(
                tmp_path_factory.mktemp("artifact") / family, family, **{**WIDE, **known, **own, **options}
            )
        return made[key]

    return artifact


def dense(artifact: Path) -> PreTrainedModel:
    return upq.load(artifact, dequantize=True, dtype=torch.float32)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- checkpoints


@pytest.mark.parametrize(
    "family",
    [
        *("qwen3_moe", "mixtral", "gpt_oss", "gpt2", "granitemoe", "gemma3"),
        *(
            pytest.param(name, marks=pytest.mark.zoo)
            for name in MODELS
            if name not in ("qwen3_moe", "mixtral", "gpt_oss", "gpt2", "granitemoe")
        ),
    ],
)
def test_dense_is_the_model_that_plain_transformers_loads(family: str, tmp_path: Path) -> None:
    """Whatever the checkpoint is like: experts one by one or in one tensor, transposed linears, a tower."""
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT, adds_bos=True)
    artifact = artifact_of_model(tmp_path / "artifact", random_model(family), tokenizer)
    assert export(artifact, "dense", tmp_path / "dense").exact
    wanted = dense(artifact)
    plain = type(wanted).from_pretrained(tmp_path / "dense", experts_implementation="eager").eval()
    assert same(dict(plain.state_dict()), dict(wanted.state_dict()))
    assert torch.equal(logits(plain), logits(wanted))


def test_experts_have_the_names_of_a_checkpoint(make: Make, tmp_path: Path) -> None:
    """What Qwen3-MoE's and Mixtral's files are like, and vLLM's loaders read."""
    for family, module, gate in (
        ("qwen3_moe", "model.layers.1.mlp.experts.3", "gate_proj"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3", "w1"),
    ):
        source = EXPORTS.get("dense")(EXPORTS.get("dense").Config()).view(Source.open(make(family)))
        fused = dense(make(family)).get_parameter("model.layers.1.mlp.experts.gate_up_proj")[3]
        weight = source.weights[f"{module}.{gate}.weight"]
        assert torch.equal(weight.dequantize(), fused[: len(fused) // 2])
        assert torch.equal(weight.dequantize(5, 9), fused[5:9])
        assert weight.name in source.linears


# --- compressed-tensors

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: pip install 'upq[export]'")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "phi3", "gemma3_text"])
def test_compressed_tensors_loads_in_transformers(family: str, make: Make, tmp_path: Path) -> None:
    report = export(make(family), "compressed-tensors", tmp_path / "out")
    assert report.exact
    assert {c.carrier for c in report.carriers} == {"int4", "float32"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()
    assert torch.equal(logits(model), logits(dense(make(family))))


@pytest.mark.parametrize(
    ("family", "expert", "router"),
    [
        ("qwen3_moe", "mlp.experts.3.down_proj", "mlp.gate"),
        ("mixtral", "block_sparse_moe.experts.3.w2", "block_sparse_moe.gate"),
        ("gpt_oss", "mlp.experts.3.down_proj", "mlp.router"),
    ],
)
def test_experts_are_packed_and_routers_ignored(
    family: str, expert: str, router: str, make: Make, tmp_path: Path
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    export(make(family), "compressed-tensors", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", f"model.layers.0.{router}", f"model.layers.1.{router}"} <= set(config["ignore"])
    path = f"model.layers.1.{expert}"
    state = {kind: stored[f"{path}.{kind}"] for kind in ("weight_packed", "weight_scale", "weight_shape")}
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    found = BaseCompressor.get_value_from_registry(config["format"]).decompress(state, scheme)["weight"]
    wanted = dense(make(family)).get_parameter("model.layers.1.mlp.experts.down_proj")[3]
    assert torch.equal(found, wanted.T if family == "gpt_oss" else wanted)


def test_gpt_oss_is_taken_apart_as_its_forward_does(make: Make, tmp_path: Path) -> None:
    """Gates are the even rows of an expert, their biases too."""
    from safetensors.torch import load_file

    report = export(make("gpt_oss"), "compressed-tensors", tmp_path / "out")
    assert any("transformers does not read" in note for note in report.notes)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    experts = dense(make("gpt_oss")).get_submodule("model.layers.0.mlp.experts")
    bias = stored["model.layers.0.mlp.experts.2.up_proj.bias"]
    assert torch.equal(bias, experts.gate_up_proj_bias[2, 1::2])
    source = EXPORTS.get("compressed_tensors")(EXPORTS.get("compressed_tensors").Config()).view(
        Source.open(make("gpt_oss"))
    )
    gate = source.weights["model.layers.0.mlp.experts.2.gate_proj.weight"]
    assert torch.equal(gate.dequantize(3, 9), experts.gate_up_proj[2].T[::2][3:9])


# --- what a format cannot hold


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        (
            "qwen3_moe",
            "humming",
            r"qwen3_moe has experts \(.*experts\.0\.gate_proj\.weight\), which humming cannot hold",
        ),
        ("qwen3_moe", "torchao", "which torchao cannot hold; dense can"),
        ("qwen3_moe", "onnx", "which onnx cannot hold"),
        ("qwen3_moe", "openvino", "which openvino cannot hold"),
        ("gpt_oss", "gptq", r"gpt_oss has experts in one tensor \(.*gate_up_proj\), which gptq cannot hold"),
        ("gpt2", "compressed_tensors", r"gpt2 has transposed linears \(.*c_attn\.weight\), which compressed_tensors"),
        ("gpt2", "gguf", "no llama.cpp architecture is known for the family 'gpt2'"),
        ("olmo2", "onnx", "the graph has Llama's block only, and olmo2 has another"),
    ],
)
def test_a_family_that_a_format_cannot_hold_is_one_line(
    family: str, name: str, message: str, make: Make, tmp_path: Path
) -> None:
    suffix = EXPORTS.get(name).suffix or ""
    with pytest.raises(UPQError, match=message) as caught:
        export(make(family), name, tmp_path / f"out{suffix}")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_gptq_holds_experts(make: Make, tmp_path: Path) -> None:
    report = export(make("qwen3_moe"), "gptq", tmp_path / "out")
    assert report.exact
    assert {c.carrier: c.weights for c in report.carriers}["int4"] == 2 * (4 + 4 * 3)


# --- gguf: transformers' own reader

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'upq[export]'")

# What transformers' reader takes from its classes' own defaults and not from the file.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "phi3": {},
    "qwen3_moe": {"moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_transformers_reads_the_same_model_from_gguf(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **{"vocab_size": 300, "eos_token_id": 257, **WIDE, **DEFAULTS[family]})
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>")
    tokenizer.pad_token = "<s>"  # Phi-3's own default is beyond so small a vocabulary
    artifact = artifact_of_model(tmp_path / "artifact", model, tokenizer)
    assert export(artifact, "gguf", tmp_path / "model.gguf").exact
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, experts_implementation="eager"
    ).eval()
    torch.testing.assert_close(logits(found), logits(dense(artifact)), rtol=0, atol=1e-5)


# --- gguf: the tensors that llama.cpp creates (src/models/*.cpp), with the values of the model


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reader = gguf.GGUFReader(file)
    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def turned(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of q and k, from its converter (LlamaModel.permute)."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def as_is(state: dict[str, Tensor], block: str, norms: dict[str, str], shift: float = 0) -> dict[str, Tensor]:
    """Llama's names, and the norms of a family."""
    linears = {f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"} | {"attn_output": "self_attn.o_proj"}
    linears |= {f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    found = {
        f"{name}.weight": state[f"{block}.{own}.weight"]
        for name, own in linears.items()
        if f"{block}.{own}.weight" in state
    }
    return found | {f"{name}.weight": state[f"{block}.{own}.weight"] + shift for name, own in norms.items()}


PRE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
POST = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
FOUR = {**POST, "attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}


def expected(family: str, state: dict[str, Tensor], block: str) -> dict[str, Tensor]:
    """By llama.cpp's names, of one block."""
    experts = f"{block}.mlp.experts"
    if family == "gemma3_text":
        return as_is(state, block, {**FOUR, **HEADS}, shift=1)
    if family == "phi3":
        fused = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
        return as_is(state, block, PRE) | {f"{n}.weight": state[f"{block}.{own}.weight"] for n, own in fused.items()}
    if family in ("olmo2", "olmo3"):
        return as_is(state, block, {**POST, **HEADS})
    if family == "gpt_oss":
        found = as_is(state, block, {"attn_norm": PRE["attn_norm"], "post_attention_norm": PRE["ffn_norm"]})
        found |= {
            f"attn_{name}.bias": state[f"{block}.self_attn.{name[0]}_proj.bias"] for name in ("q", "k", "v", "output")
        }
        gate_up, bias = state[f"{experts}.gate_up_proj"].mT, state[f"{experts}.gate_up_proj_bias"]
        return found | {
            "attn_sinks.weight": state[f"{block}.self_attn.sinks"],
            "ffn_gate_inp.weight": state[f"{block}.mlp.router.weight"],
            "ffn_gate_inp.bias": state[f"{block}.mlp.router.bias"],
            "ffn_gate_exps.weight": gate_up[:, ::2],
            "ffn_up_exps.weight": gate_up[:, 1::2],
            "ffn_down_exps.weight": state[f"{experts}.down_proj"].mT,
            "ffn_gate_exps.bias": bias[:, ::2],
            "ffn_up_exps.bias": bias[:, 1::2],
            "ffn_down_exps.bias": state[f"{experts}.down_proj_bias"],
        }
    found = as_is(state, block, {**PRE, **(HEADS if family == "qwen3_moe" else {})})
    if family in ("granite", "mixtral"):
        found["attn_q.weight"] = turned(found["attn_q.weight"], 4)
        found["attn_k.weight"] = turned(found["attn_k.weight"], 2)
    if family in ("qwen3_moe", "mixtral"):
        gate, up = state[f"{experts}.gate_up_proj"].chunk(2, dim=1)
        found |= {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
        found["ffn_down_exps.weight"] = state[f"{experts}.down_proj"]
        found["ffn_gate_inp.weight"] = state[f"{block}.mlp.gate.weight"]
    return found


# The keys that their load_arch_hparams reads beside Llama's.
KEYS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "gemma3.attention.sliding_window": 4096,
        "gemma3.attention.sliding_window_pattern": [True, True],
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
        "gemma3.attention.key_length": 16,
    },
    "phi3": {"phi3.attention.sliding_window": 0, "phi3.rope.dimension_count": 16},
    "olmo2": {"olmo2.attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "olmo2.attention.sliding_window": None},
    "olmo3": {"olmo2.attention.sliding_window": 4096, "olmo2.attention.sliding_window_pattern": [True, True]},
    "granite": {
        "granite.attention.scale": 0.25,
        "granite.embedding_scale": 12.0,
        "granite.residual_scale": pytest.approx(0.22),
        "granite.logit_scale": 8.0,
    },
    "qwen3_moe": {
        "qwen3moe.expert_count": 4,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": 48,
    },
    "mixtral": {"llama.expert_count": 4, "llama.expert_used_count": 2, "llama.feed_forward_length": 96},
    "gpt_oss": {
        "gpt-oss.expert_count": 4,
        "gpt-oss.expert_used_count": 2,
        "gpt-oss.expert_feed_forward_length": 96,
        "gpt-oss.attention.sliding_window": 128,
        "gpt-oss.attention.sliding_window_pattern": [True, False],
        "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": 32.0,
        "gpt-oss.rope.scaling.original_context_length": 4096,
        "gpt-oss.rope.scaling.yarn_beta_fast": 32.0,
    },
}


@pytest.mark.parametrize("family", KEYS)
def test_llama_cpp_finds_every_tensor_and_key(family: str, make: Make, tmp_path: Path) -> None:
    report = export(make(family), "gguf", tmp_path / "model.gguf")
    assert report.exact
    assert {c.carrier for c in report.carriers} == {"Q4_0", "F32"}
    state = dict(dense(make(family)).state_dict())
    wanted = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output.weight": state["lm_head.weight"],
        "output_norm.weight": state["model.norm.weight"] + (family == "gemma3_text"),
    }
    for n in range(2):
        wanted |= {f"blk.{n}.{name}": t for name, t in expected(family, state, f"model.layers.{n}").items()}
    fields, found = read(tmp_path / "model.gguf")
    assert {name: fields.get(name) for name in KEYS[family]} == KEYS[family]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_gemma_with_a_tower_is_its_language_model(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT, adds_bos=True)
    model = random_model("gemma3", query_pre_attn_scalar=8)
    artifact = artifact_of_model(tmp_path / "artifact", model, tokenizer)
    report = export(artifact, "gguf", tmp_path / "model.gguf")
    assert report.exact
    assert any("the language model alone" in note for note in report.notes)
    _, found = read(tmp_path / "model.gguf")
    state = dict(dense(artifact).state_dict())
    assert torch.equal(found["blk.3.ffn_up.weight"], state["model.language_model.layers.3.mlp.up_proj.weight"])
    assert all(re.match(r"blk\.|token_embd|output", name) for name in found)


def test_longrope_is_two_tensors_and_a_factor(make: Make, tmp_path: Path) -> None:
    """Phi-3's rotary positions, on three quarters of a head as in Phi-4-mini."""
    short, long = [1.0 + n / 8 for n in range(6)], [2.0 + n for n in range(6)]
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long,
        "original_max_position_embeddings": 32, "partial_rotary_factor": 0.75,
    }  # fmt: skip
    artifact = make("phi3", rope_parameters=rope, max_position_embeddings=128, original_max_position_embeddings=32)
    report = export(artifact, "gguf", tmp_path / "model.gguf")
    assert any("once its context is over 32" in note for note in report.notes)
    fields, found = read(tmp_path / "model.gguf")
    assert found["rope_factors_short.weight"].tolist() == short
    assert found["rope_factors_long.weight"].tolist() == long
    assert fields["phi3.rope.dimension_count"] == 12
    assert fields["phi3.rope.scaling.original_context_length"] == 32
    wanted = math.sqrt(1 + math.log(4) / math.log(32))
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gemma3_text", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 16 in this family, the model 100"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping None in this family, the model 30"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "windows but in every block 6 here; block 0 differs",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob True in this family, the model False"),
        ("gpt_oss", {"swiglu_limit": 5.0}, r"swiglu_limit 7\.0 in this family, the model 5\.0"),
        ("olmo2", {"tie_word_embeddings": True}, "wants a head beside the embedding"),
        ("phi3", {"head_dim": 32, "num_attention_heads": 4}, "heads of hidden_size/heads here, the model of 32"),
        ("gemma3_text", {"attention_bias": True}, r"llama\.cpp has no place for model\.layers\.0.*bias in this family"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    family: str, options: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    with pytest.raises(UPQError, match=message):
        export(make(family, **options), "gguf", tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_expert_is_read_in_parts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not neighbours in the artefact, and stacks of several runs of rows."""
    monkeypatch.setattr("upq.exports._source._CHUNK", 300)
    for family in ("qwen3_moe", "gpt_oss"):
        source = EXPORTS.get("gguf")(EXPORTS.get("gguf").Config()).view(Source.open(make(family)))
        for name in ("gate_proj", "down_proj"):
            weight = source.weights[f"model.layers.1.mlp.experts.{name}.weight"]
            parts = [weight.dequantize(start, stop) for start, stop in weight.chunks()]
            assert len(parts) > 10
            assert torch.equal(torch.cat(parts), weight.dequantize())


def test_no_bytes_of_a_llama_depend_on_any_of_it(make: Make, tmp_path: Path) -> None:
    """A view of a family without conversions is the artefact itself."""
    artifact = Path(shutil.copytree(make("qwen3"), tmp_path / "copy"))
    source = Source.open(artifact)
    assert EXPORTS.get("dense")(EXPORTS.get("dense").Config()).view(source) is source

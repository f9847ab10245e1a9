"""Where a causal LM keeps its parts, by rule, over every type that transformers has."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, BertModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tiny import FAMILIES, tiny_model
from upq.core.errors import UPQError
from upq.model.coverage import LEAST, coverage
from upq.model.layout import block_list, layout_of, shared_weights
from upq.model.matrices import left_out, matrices
from zoo import WRAPPERS, random_model

# transformers' types without a list of gradient-checkpointing layers: models of before 2021.
WITHOUT_BLOCKS = {"cpmant", "ctrl", "gpt_neox_japanese", "openai-gpt", "xlm", "xlnet"}
# Types of which less than nine tenths of the decoder's blocks become codes, and why.
PARTIAL = {"zamba": "its blocks share one transformer", "zamba2": "its blocks share some transformers"}
REASONS = {
    *("router", "embedding", "convolution", "small parameter of the state"),
}
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def default_model(kind: str) -> PreTrainedModel | None:
    """In the configuration that its class has without settings, without memory; None where that cannot be built."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
    except Exception:
        return None
    return model


@pytest.mark.nightly
def test_every_type_has_a_layout_and_every_matrix_a_verdict() -> None:
    """Each linear and each tensor of experts in a block is quantised, or left out for a reason that has a name."""
    built = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if (model := default_model(kind)) is None:
            continue
        built += 1
        if kind in WITHOUT_BLOCKS:
            with pytest.raises(UPQError, match=r"has no list of decoder blocks"):
                layout_of(model)
            continue
        layout, shared, coded, total = layout_of(model), shared_weights(model), 0, 0
        for index, block in enumerate(block_list(model, layout)):
            reasons, names = left_out(block), {matrix.parameter for matrix in matrices(block)}
            assert not names & reasons.keys()
            many = {name for name, parameter in block.named_parameters() if parameter.dim() > 1}
            assert many == names | reasons.keys(), kind
            for reason in reasons.values():
                assert reason in REASONS or re.fullmatch(r"parameter of \w+", reason), (kind, reason)
            coded += sum(
                m.rows * m.inputs for m in matrices(block) if f"{layout.blocks}.{index}.{m.parameter}" not in shared
            )
            total += sum(parameter.numel() for parameter in block.parameters())
        assert (coded >= LEAST * total) == (kind not in PARTIAL), (kind, coded / total)
    assert built >= 173


@pytest.mark.parametrize("name", FAMILIES)
def test_llamas_block(name: str) -> None:
    """For families whose block is Llama's, the rule gives what people expect of it."""
    model = tiny_model(name, tie_word_embeddings=False)
    layout = layout_of(model)
    assert (layout.decoder, layout.blocks) == ("model", "model.layers")
    assert (layout.embedding, layout.head) == ("model.embed_tokens", "lm_head")
    for block in block_list(model, layout):
        assert tuple(matrix.name.rpartition(".")[2] for matrix in matrices(block)) == LLAMA
        assert left_out(block) == {}


@pytest.mark.parametrize(
    ("kind", "names", "left"),
    [
        ("qwen3_moe", {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}, {"mlp.gate.weight": "router"}),
        ("mixtral", {"mlp.experts.gate_up_proj"}, {"mlp.gate.weight": "router"}),
        (
            "qwen3_next",
            {"linear_attn.in_proj_qkvz", "linear_attn.out_proj"},
            {
                "linear_attn.in_proj_ba.weight": "small parameter of the state",
                "linear_attn.conv1d.weight": "convolution",
            },
        ),
        ("mamba2", {"mixer.in_proj", "mixer.out_proj"}, {"mixer.conv1d.weight": "convolution"}),
        ("gpt2", {"attn.c_attn", "mlp.c_proj"}, {}),
        ("falcon", {"self_attention.query_key_value"}, {}),
    ],
)
def test_what_becomes_codes_and_what_does_not(kind: str, names: set[str], left: dict[str, str]) -> None:
    block = block_list(random_model(kind))[0]
    assert names <= {matrix.name for matrix in matrices(block)}
    assert left.items() <= left_out(block).items()


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "qwen3_moe", "gpt2"])
def test_a_matrix_is_read_and_written_as_it_multiplies(kind: str) -> None:
    """(E·O, I), whatever way round the parameter is stored."""
    block = block_list(random_model(kind))[-1]
    for matrix in matrices(block):
        weight = matrix.read(block).clone()
        assert weight.shape == matrix.shape
        parameter = block.get_parameter(matrix.parameter)
        assert tuple(parameter.shape) == matrix.parameter_shape
        assert torch.equal(matrix.shaped(weight), parameter)
        matrix.write(block, 2 * weight)
        assert torch.equal(matrix.read(block), 2 * weight)
    experts = [matrix for matrix in matrices(block) if matrix.experts]
    assert all((matrix.transposed, matrix.experts) == (kind != "qwen3_moe", 4) for matrix in experts)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_of_a_model_with_a_tower_the_language_model_is_taken(kind: str) -> None:
    layout = layout_of(random_model(kind))
    assert "language_model" in layout.decoder
    assert layout.blocks == f"{layout.decoder}.layers"


def test_coverage_counts_every_weight_once() -> None:
    for kind in ("llama", "qwen3_moe", "gemma3", "zamba2"):
        model = random_model(kind)
        found = coverage(model)
        assert found.coded + sum(found.left.values()) == found.in_model == sum(p.numel() for p in model.parameters())
        assert found.coded + sum(found.left_in_blocks.values()) == found.in_blocks
        assert (found.share < LEAST) == (kind == "zamba2")
    with pytest.raises(
        UPQError, match=r"of the weights in its decoder blocks can become codes; left would be shared by"
    ):
        found.check("zamba2", allow_partial=False)
    found.check("zamba2", allow_partial=True)


def test_what_is_no_causal_language_model_is_refused() -> None:
    with torch.device("meta"):
        bert = BertModel(AutoConfig.for_model("bert", num_hidden_layers=1))
    with pytest.raises(UPQError, match=r"^BertModel has no head over the vocabulary that transformers names"):
        layout_of(bert)

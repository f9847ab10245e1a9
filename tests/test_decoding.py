"""The compiled decoder against transformers' own loop on the same weights, for every family that it takes."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import upq
from tiny import FAMILIES, byte_tokenizer, tiny_model
from upq import decoding, kernels
from upq.artifact.manifest import Manifest, SourceModel
from upq.artifact.transformers import pack_model, quantize_rows, write_artifact
from upq.core.errors import UPQError
from upq.core.scheme import QTensor, QuantScheme
from upq.decoding import Session
from upq.kernels import cpu
from upq.model.matrices import Matrix
from upq.nn.blocks import model_weights
from upq.nn.packed import Factor, PackedEmbedding
from zoo import random_model

# What a family is made of beside its sizes.
MADE: dict[str, dict[str, Any]] = {
    **{name: {} for name in FAMILIES},
    "granite": {
        "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2, "logits_scaling": 6.0,
    },
    "gemma3_text": {
        "sliding_window": 9, "query_pre_attn_scalar": 11, "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo2": {},
    "phi3": {},
    "qwen3_moe": {
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True,
    },
}  # fmt: skip
COMPUTES = ["w2a8", "w2a16"]
SEQ2 = QuantScheme(bits=2)
PROMPT = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def as_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("UPQ_KERNELS", raising=False)
    kernels.set_compute(None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    kernels.set_compute(None)


def packed(name: str, *, scheme: QuantScheme = SEQ2, embeddings_bits: Any = None, **config: Any) -> PreTrainedModel:
    """A tiny random model on codes, attached."""
    model = tiny_model(name, **{**MADE[name], **config})
    pack_model(model, codes(model, scheme), embeddings_bits=embeddings_bits)
    decoding.attach(model)
    return model


def codes(model: PreTrainedModel, scheme: QuantScheme = SEQ2) -> dict[str, QTensor]:
    found = dict[str, QTensor]()
    for path, weight in model_weights(model).items():
        assert isinstance(weight, Matrix)
        found[path] = quantize_rows(
            weight.flat(model.get_parameter(path if weight.experts else f"{path}.weight")), scheme
        )
    return found


def by_transformers(model: PreTrainedModel, ids: Tensor = PROMPT, **options: Any) -> Any:
    """What the loop of transformers generates, with the same kernels."""
    plain: Any = GenerationMixin.generate
    return plain(model, ids, **options)


def compiled(model: PreTrainedModel, ids: Tensor = PROMPT, **options: Any) -> Any:
    generate: Any = model.generate
    found = generate(ids, **options)
    assert model.why_not_compiled is None
    return found


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits[0, -1].float()


def assert_same_tokens(
    model: PreTrainedModel, ids: Tensor = PROMPT, *, reference: PreTrainedModel | None = None, **options: Any
) -> None:
    """Greedy tokens; they may part only where the two best logits are equal but for the rounding of float32.

    In w2a8 that rounding may tip an activation over to the next of its 127 steps: 1e-2 of a logit at these widths.
    """
    reference = reference or model
    ours = compiled(model, ids, do_sample=False, **options)[0]
    theirs = by_transformers(reference, ids, do_sample=False, **options)[0]
    if torch.equal(ours, theirs):
        return
    at = next(i for i, (a, b) in enumerate(zip(ours.tolist(), theirs.tolist(), strict=False)) if a != b)
    found = logits(reference, theirs[None, :at])
    gap = found[theirs[at]] - found[ours[at]]
    assert gap < {"w2a8": 1e-2, "w2a16": 1e-5}[kernels.compute()] * found.std(), at


# --- greedy tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("name", MADE)
def test_greedy_tokens_are_those_of_transformers(name: str, compute: str) -> None:
    for tied, bits in ((False, None), (True, 8), (False, 4), (True, None)):
        model = packed(name, tie_word_embeddings=tied, embeddings_bits=bits)
        with kernels.computing(compute):
            assert_same_tokens(model, max_new_tokens=30)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one block": ("llama", {"num_hidden_layers": 1}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "a sliding window": ("mistral", {"sliding_window": 7}),
    "a window in some blocks": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "blocks without positions": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}),
    "a window where there are no positions": (
        "smollm3",
        {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6},
    ),
    "keys of another family": ("llama", {"sliding_window": 7, "use_sliding_window": True, "no_rope_layers": [0, 0]}),
    "one key head": ("qwen2", {"num_key_value_heads": 1}),
    "as many key heads": ("llama", {"num_key_value_heads": 4}),
    "wide heads": ("llama", {"head_dim": 80}),
    "llama 3's positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
    ),
    "yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "positions on a part of the head": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "fused linears and a window": ("phi3", {"sliding_window": 6, "num_key_value_heads": 1}),
    "factors and biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "local and global positions": (
        "gemma3_text",
        {
            "head_dim": 12,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
            },
        },
    ),
    "shares that do not sum to one": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "experts in some blocks": ("qwen3_moe", {"mlp_only_layers": [0], "sliding_window": 6, "use_sliding_window": True}),
    "experts in every second block": ("qwen3_moe", {"decoder_sparse_step": 2, "num_experts_per_tok": 5}),
    "norms over all heads": ("olmo2", {"attention_bias": True, "num_key_value_heads": 1}),
}  # fmt: skip


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_block(variant: str, compute: str) -> None:
    name, config = VARIANTS[variant]
    with kernels.computing(compute):
        assert_same_tokens(packed(name, **config), max_new_tokens=30)


@pytest.mark.parametrize("case", [*MADE, *VARIANTS])
def test_logits_are_those_of_the_model(case: str) -> None:
    """After prompts and after single tokens, and past the windows."""
    name, config = VARIANTS.get(case, (case, {}))
    model = packed(name, **config)
    ids = torch.randint(1, 67, (1, 61), generator=torch.Generator().manual_seed(3))
    with kernels.computing("w2a16"), torch.no_grad():
        theirs = model(ids).logits[0].float()
        held = session(model)
        for prompt in (1, 40):
            ours = held.logits_V(ids[0, :prompt].tolist())
            for length in range(prompt, prompt + 20):
                torch.testing.assert_close(ours, theirs[length - 1], rtol=1e-4, atol=1e-4)
                ours = held.extend_V(ids[0, length : length + 1].tolist())


def test_every_family_is_tested() -> None:
    assert {*MADE, "gemma3"} == set(decoding.COMPILED)


def test_texts_of_a_model_with_a_tower() -> None:
    """The ids of types are those of a text, zeros; images have ones, and attend in both directions."""
    model = random_model("gemma3", sliding_window=9)
    pack_model(model, codes(model))
    decoding.attach(model)
    with kernels.computing("w2a16"):
        assert_same_tokens(model, max_new_tokens=12, token_type_ids=torch.zeros_like(PROMPT))
        generate: Any = model.generate
        types = (PROMPT > 7).long()
        ours = generate(PROMPT, max_new_tokens=4, do_sample=False, token_type_ids=types)
        assert model.why_not_compiled == "token_type_ids was given"
        assert torch.equal(ours, by_transformers(model, max_new_tokens=4, do_sample=False, token_type_ids=types))


@pytest.mark.parametrize(
    "scheme", [QuantScheme(bits=2, group_size=8, grid="affine"), QuantScheme(bits=3), QuantScheme(bits=8)]
)
def test_schemes(scheme: QuantScheme) -> None:
    with kernels.computing("w2a16"):
        assert_same_tokens(packed("llama", scheme=scheme, intermediate_size=48), max_new_tokens=20)


@pytest.mark.parametrize("window", [None, 50])
def test_prompts_longer_than_a_portion(window: int | None) -> None:
    """512 tokens are one call, 128 go through a block together, and keys lie in blocks of 16."""
    model = packed("mistral", max_position_embeddings=1024, sliding_window=window)
    ids = torch.randint(1, 67, (1, 600), generator=torch.Generator().manual_seed(0))  # 0 is padding to transformers
    with kernels.computing("w2a16"):
        for length in (127, 128, 129, 600):
            ours = session(model).logits_V(ids[0, :length].tolist())
            torch.testing.assert_close(ours, logits(model, ids[:, :length]), rtol=1e-4, atol=1e-4)
        assert_same_tokens(model, ids, max_new_tokens=10)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen3", torch.bfloat16), ("qwen3", torch.float16), ("gemma3_text", torch.bfloat16),
        ("granite", torch.bfloat16), ("qwen3_moe", torch.bfloat16),
    ],
)  # fmt: skip
def test_a_model_in_16_bits_is_computed_in_float32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Its tokens are those of the artefact loaded in float32, with the factor of its embedding as 16 bits have it."""
    out = artefact(tmp_path / "a", tiny_model(name, **MADE[name]).to(dtype), embeddings_bits=8)
    ours, reference = upq.load(out), upq.load(out, dtype=torch.float32, decoder="transformers")
    table = reference.get_input_embeddings()
    assert isinstance(table, PackedEmbedding)
    table.factor = Factor(table.factor.of_dtype(dtype))
    assert (ours.dtype, reference.dtype) == (dtype, torch.float32)
    assert_same_tokens(ours, reference=reference, max_new_tokens=30)


def artefact(out: Path, model: PreTrainedModel, **options: Any) -> Path:
    out.mkdir()
    write_artifact(
        out, model, codes(model), manifest=Manifest(model=SourceModel(path="org/tiny", digest="0")), **options
    )
    return out


# --- the cache -----------------------------------------------------------------------------------------------------


def session(model: PreTrainedModel) -> Session:
    return decoding.session(model)


LONG: dict[str, dict[str, Any]] = {
    "qwen3": {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 24},
    "qwen3_moe": {"mlp_only_layers": [0]},
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("isa", cpu.instruction_sets())
def test_logits_depend_on_the_tokens_alone(isa: str, compute: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: not on portions, threads, or what stood in the cache."""
    monkeypatch.setenv("UPQ_CPU_ISA", isa)
    cpu.instruction_set.cache_clear()
    try:
        model = packed(name, **LONG[name])
        ids = torch.randint(67, (150,), generator=torch.Generator().manual_seed(1)).tolist()
        with kernels.computing(compute):
            held = session(model)
            whole = held.logits_V(ids)
            assert torch.equal(held.logits_V(ids), whole)  # all but the last token from the cache
            held.logits_V([*ids[:100], 5, 6, 7])
            assert torch.equal(held.logits_V(ids), whole)  # a hundred from the cache
            held.forget()
            held.logits_V(ids[:1])
            held.extend_V(ids[1:31])
            for token in ids[31:]:
                last = held.extend_V([token])
            assert torch.equal(last, whole)
            torch.set_num_threads(3)
            held.forget()
            assert torch.equal(held.logits_V(ids), whole)
    finally:
        monkeypatch.undo()
        cpu.instruction_set.cache_clear()


def test_other_kernels_do_not_read_what_these_have_cached() -> None:
    model, fresh = packed("llama"), packed("llama")
    ids = PROMPT[0].tolist()
    for compute in ("w2a8", "w2a16", "w2a8"):
        with kernels.computing(compute):
            assert torch.equal(session(model).logits_V(ids), session(fresh).logits_V(ids))
            session(fresh).forget()


def test_a_conversation_goes_on_from_the_cache() -> None:
    model = packed("llama")
    first = compiled(model, max_new_tokens=8)
    longer = torch.cat([first, PROMPT[:, :4]], 1)
    assert_same_tokens(model, longer, max_new_tokens=8)
    assert_same_tokens(model, PROMPT[:, :9], max_new_tokens=8)


def test_changed_weights_are_noticed() -> None:
    model = packed("llama", embeddings_bits=None)
    ids = PROMPT[0].tolist()
    held = session(model)
    before = held.logits_V(ids)
    assert session(model) is held
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight_scale *= 2
    assert session(model) is not held
    assert not torch.equal(session(model).logits_V(ids), before)
    held = session(model)
    model.model.norm.weight = nn.Parameter(torch.ones(32))
    assert session(model) is not held
    held = session(model)
    model.to(torch.bfloat16)
    assert session(model) is not held


def test_a_token_reads_its_own_experts_alone() -> None:
    """What the others hold does not matter, not even NaN."""
    model = packed("qwen3_moe", num_hidden_layers=1)
    chosen: list[Tensor] = []
    handle = model.model.layers[0].mlp.gate.register_forward_hook(lambda _m, _x, out: chosen.append(out[2]))
    with kernels.computing("w2a16"):
        logits(model, torch.tensor([[7]]))
        handle.remove()
        expected = session(model).logits_V([7])
        experts = model.model.layers[0].mlp.experts
        others = [e for e in range(5) if e not in chosen[0].flatten().tolist()]
        assert len(others) == 3
        for tall in (experts.gate_up_proj, experts.down_proj):
            tall.weight_scale.view(5, -1)[others] = torch.nan
        assert torch.equal(session(model).logits_V([7]), expected)
        assert session(model).logits_V(list(range(60))).isnan().any()


# --- what generate promises ----------------------------------------------------------------------------------------


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.puts = self.ends = 0

    def put(self, value: Tensor) -> None:
        self.puts += 1
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ends += 1


def test_streamers_hear_the_prompt_once_and_then_every_token() -> None:
    model = packed("llama")
    ours, theirs = Heard(), Heard()
    ids = compiled(model, streamer=ours, max_new_tokens=9, do_sample=False)
    by_transformers(model, streamer=theirs, max_new_tokens=9, do_sample=False)
    assert ours.tokens == ids[0].tolist()
    assert vars(ours) == vars(theirs)
    heard = Heard()  # declined: transformers alone speaks to it
    generate: Any = model.generate
    generate(PROMPT, streamer=heard, max_new_tokens=9, do_sample=False, use_cache=False)
    assert model.why_not_compiled == "use_cache=False"
    assert vars(heard) == vars(theirs)


class After(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] >= self.length])


def test_stops_where_transformers_stops() -> None:
    model = packed("llama")
    written = compiled(model, max_new_tokens=12, do_sample=False)[0, 17:].tolist()
    end = next(token for i, token in enumerate(written) if i > 2 and token not in written[:i])
    for options in (
        {"eos_token_id": end, "pad_token_id": 0},
        {"eos_token_id": [1, end], "min_new_tokens": 10, "pad_token_id": 0},
        {"stopping_criteria": [After(20)]},
        {"max_length": 19, "max_new_tokens": None},
        {"tokenizer": byte_tokenizer()},  # nobody needs it: there are no stop_strings
    ):
        options = {"max_new_tokens": 12, "do_sample": False, **options}
        assert torch.equal(compiled(model, **options), by_transformers(model, **options)), options


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"do_sample": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": False, "bad_words_ids": [[5], [6]], "min_new_tokens": 5},
    ],
)
def test_processors_and_sampling_are_those_of_transformers(options: dict[str, Any]) -> None:
    model = packed("qwen2")
    with kernels.computing("w2a16"):
        for seed in range(3):
            torch.manual_seed(seed)
            ours = compiled(model, max_new_tokens=20, **options)
            state = torch.get_rng_state()
            torch.manual_seed(seed)
            assert torch.equal(ours, by_transformers(model, max_new_tokens=20, **options))
            assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_return_sequences": 2, "do_sample": True}, "a batch of 2"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation was given"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
        ({"stop_strings": "a", "tokenizer": byte_tokenizer()}, "stop_strings were given"),
        (
            {"generation_config": GenerationConfig(stop_strings="a"), "tokenizer": byte_tokenizer()},
            "stop_strings were given",
        ),
        ({"attention_mask": torch.tensor([[0] * 3 + [1] * 14])}, "an attention mask with gaps"),
    ],
)
def test_what_it_does_not_know_goes_to_transformers(
    options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = packed("llama")
    generate: Any = model.generate
    for _ in range(2):
        torch.manual_seed(0)
        ours = generate(PROMPT, max_new_tokens=5, **options)
    assert model.why_not_compiled == reason
    warnings = [record.message for record in caplog.records if record.name == "upq"]
    assert warnings == [f"transformers generates, not the compiled decoder: {reason}"]  # once
    torch.manual_seed(0)
    theirs = by_transformers(model, max_new_tokens=5, **options)
    if reason == "return_dict_in_generate":
        ours, theirs = ours.sequences, theirs.sequences
    assert torch.equal(ours, theirs)
    compiled(model, max_new_tokens=5)  # and the next plain text does not


def test_models_it_does_not_know_go_to_transformers() -> None:
    ids = torch.cat([PROMPT, PROMPT])
    for change, reason in (
        (lambda m: m.train(), "the model is in training mode"),
        (lambda m: m.model.layers[1].mlp.register_forward_hook(lambda *_: None), "model.layers.1.mlp has a hook"),
        (lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU()), "the activation GELU"),
        (lambda m: setattr(m.model.rotary_emb, "rope_type", "dynamic"), "rotary positions of the type dynamic"),
        (lambda m: m.model.layers[0].mlp.add_module("extra", nn.Identity()), "LlamaMLP has a part called extra"),
        (lambda m: setattr(m, "lm_head", nn.Sequential(m.lm_head)), "a linear of the type Sequential"),
        (lambda m: setattr(m.config, "model_type", "mistral"), "a block of the type LlamaDecoderLayer"),
    ):
        model = packed("llama")
        change(model)
        generate: Any = model.generate
        generate(PROMPT, max_new_tokens=2)
        assert model.why_not_compiled == reason
    model = packed("llama")
    with kernels.computing("reference"):
        generate = model.generate
        assert torch.equal(generate(PROMPT, max_new_tokens=3), by_transformers(model, max_new_tokens=3))
    assert model.why_not_compiled == "the kernels are set to reference"
    assert torch.equal(generate(ids, max_new_tokens=3), by_transformers(model, ids, max_new_tokens=3))
    assert model.why_not_compiled == "a batch of 2"


def test_families_it_does_not_know_go_to_transformers() -> None:
    """Gemma 2 has Gemma 3's modules and another forward pass. LongRoPE's frequencies change with the length."""
    long = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    for name, config, reason in (
        ("gemma2", {}, "the family gemma2 is not compiled"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is not compiled"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention in both directions"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **long}},
            "rotary positions of the type longrope",
        ),
    ):
        model = tiny_model(name, **config)
        pack_model(model, codes(model))
        decoding.attach(model)
        generate: Any = model.generate
        ours = generate(PROMPT, max_new_tokens=4, do_sample=False)
        assert model.why_not_compiled == reason
        assert torch.equal(ours, by_transformers(model, max_new_tokens=4, do_sample=False))


def test_two_threads_do_not_share_the_cache() -> None:
    model = packed("llama")
    alone = compiled(model, max_new_tokens=6, do_sample=False)
    inner: list[Tensor] = []

    class Meanwhile(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
            if not inner:
                generate: Any = model.generate
                thread = Thread(target=lambda: inner.append(generate(PROMPT, max_new_tokens=6, do_sample=False)))
                thread.start()
                thread.join()
                assert model.why_not_compiled == "another thread is generating with this model"
            return torch.tensor([False])

    outer = compiled(model, max_new_tokens=6, do_sample=False, stopping_criteria=[Meanwhile()])
    assert torch.equal(outer, alone)
    assert torch.equal(inner[0], alone)


def test_token_ids_are_checked() -> None:
    held = session(packed("llama"))
    for ids in ([67], [3, -1]):
        with pytest.raises(UPQError, match="token ids must be at least one, from 0 to 66"):
            held.logits_V(ids)


# --- loading -------------------------------------------------------------------------------------------------------


def test_load_attaches_and_from_pretrained_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    out = artefact(tmp_path / "a", tiny_model("llama"))
    model, plain = upq.load(out), AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, type(plain))
    assert not hasattr(plain, "why_not_compiled")
    assert not hasattr(upq.load(out, decoder="transformers"), "why_not_compiled")
    assert not hasattr(upq.load(out, dequantize=True), "why_not_compiled")
    with pytest.raises(UPQError, match="unknown decoder 'fast'; choose upq or transformers"):
        upq.load(out, decoder="fast")  # type: ignore[arg-type]
    assert_same_tokens(model, reference=plain, max_new_tokens=20)
    model.save_pretrained(tmp_path / "b")
    plain.save_pretrained(tmp_path / "c")
    for file in (tmp_path / "c").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    model = upq.load(out)
    model.dequantize()
    generate: Any = model.generate
    generate(PROMPT, max_new_tokens=2)
    assert model.why_not_compiled == "its linears are not packed"


def test_copies_and_pickles_generate_for_themselves() -> None:
    model = packed("llama")
    expected = compiled(model, max_new_tokens=6, do_sample=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(compiled(twin, max_new_tokens=6, do_sample=False), expected)
        assert session(twin) is not session(model)
        assert (
            session(twin).parts.blocks[0].qkv[0].weight is not session(model).parts.blocks[0].qkv[0].weight
        )  # kernels.Weight


def test_inference_mode() -> None:
    model = packed("llama")
    with torch.inference_mode():
        assert_same_tokens(model, max_new_tokens=6)
    assert_same_tokens(model, max_new_tokens=6)


def test_bytes_of_a_token() -> None:
    model = packed("llama", tie_word_embeddings=False)
    parts = session(model).parts
    layers = [m for m in model.modules() if hasattr(m, "kernel_weight")]
    rearranged = sum(m.kernel_weight().matrix().nbytes for m in layers)
    assert parts.weight_bytes == rearranged + model.lm_head.weight.nbytes
    assert parts.cache_bytes == 2 * 4 * 2 * 2 * 8
    sparse, dense = (session(packed("qwen3_moe", num_experts=n)).parts for n in (5, 2))
    assert sparse.weight_bytes - dense.weight_bytes == 2 * 3 * 32 * 4  # two of five: only the routers differ

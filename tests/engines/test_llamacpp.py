"""llama.cpp runs what UPQ exports: the same logits, tokens and chat. `make test-engines` sets it up.

llama.cpp rounds the inputs of every product to the block type of its weight, and keys and values to half precision.
So three laws, each as sharp as it can be: with weights in float32, where it rounds nothing, it computes the packed
model; with packed weights, the packed model whose inputs are rounded as it rounds them; and on a trained model what all
of this rounding costs is small.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-engines")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import upq  # noqa: E402
from ggml import rounded_inputs  # noqa: E402
from tiny import (  # noqa: E402
    FAMILIES,
    artifact_of,
    tiny_artifact,
)
from upq.core.scheme import QuantScheme  # noqa: E402
from upq.exports import export  # noqa: E402
from upq.model.loading import load_tokenizer  # noqa: E402
from upq.run.recipe import Recipe  # noqa: E402
from upq.run.run import quantize  # noqa: E402
from upq.world import World  # noqa: E402
from upq.world.corpus import write_corpus  # noqa: E402
from upq.world.reference import REFERENCE  # noqa: E402

pytestmark = pytest.mark.usefixtures("reference")

STORIES = Path(__file__).resolve().parents[3] / "shared/data/models/stories260K"
PROMPTS = (
    "Who lives in Ostrava?",
    "Tell me about the weather.",
    "Write three words about a river.",
    "What is the capital of the north?",
    "Answer in one sentence: why do birds sing?",
)
TEXTS = (
    *PROMPTS,
    "Once upon a time, there was a little girl named Lily. She loved to play outside!",
    "  two spaces,\ttabs\n\nand lines\n",
    "1995 costs $3.50 (or €2,99) — naïve façade, ÆØÅ, 東京, 🙂",
    "'don't', WE'RE, it's I'LL",
    "",
)
COST = 1e-3  # nats: of all that llama.cpp rounds, on a trained model
EXACT = 1e-9  # float32 in another order: 2e-13 measured
NEAR = 0.35  # of the cost of rounding: how far two roundings of the same inputs, a few of which fall apart, may be


class Engine:
    """A GGUF file in llama.cpp, on one thread."""

    def __init__(self, file: Path, context: int = 512, *, exact_cache: bool = False) -> None:
        f32 = llama_cpp.GGML_TYPE_F32
        cache = {"type_k": f32, "type_v": f32, "flash_attn": False} if exact_cache else {}
        self.llama = llama_cpp.Llama(str(file), n_ctx=context, n_threads=1, logits_all=True, verbose=False, **cache)

    def logits(self, ids: list[int]) -> Tensor:
        self.llama.reset()
        self.llama.eval(ids)
        return torch.from_numpy(np.array(self.llama.scores[: len(ids)]))

    def tokenize(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)


def logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def load(artifact: Path) -> PreTrainedModel:
    return upq.load(artifact, dtype=torch.float32)


def kl(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """KL(p ‖ q) of each token, nats."""
    p, q = p_TV.double().log_softmax(-1), q_TV.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The reference model as a user gets it, but for a tenth of the tokens; and its GGUF."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder / "train.jsonl", World(), n=2000, seed=1)
    few = [f"data.sources=[{{path: {folder / 'train.jsonl'}}}]", "distill.tokens=30_000", "data.generated=null"]
    artifact = folder / "artifact"
    quantize(REFERENCE, Recipe.load("demo", few), artifact, device="cpu")
    assert export(artifact, "gguf", folder / "model.gguf").exact
    return artifact, folder / "model.gguf"


@pytest.fixture(scope="module", params=["reference", "stories260K"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A real model on the nearest levels, artefact and GGUF."""
    source = {"reference": REFERENCE, "stories260K": STORIES}[request.param]
    if not source.is_dir():
        pytest.skip(f"{source} is not here")
    folder = tmp_path_factory.mktemp(request.param)
    artifact = artifact_of(folder / "artifact", source)
    assert export(artifact, "gguf", folder / "model.gguf").exact
    return artifact, folder / "model.gguf"


def test_tokenizer_splits_as_transformers_does(exported: tuple[Path, Path]) -> None:
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(exported[0])
    engine = Engine(exported[1])
    for text in TEXTS:
        assert engine.tokenize(text) == tokenizer(text).input_ids, text
    template = getattr(tokenizer, "chat_template", None)
    if template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
        assert engine.llama.tokenize(text.encode(), add_bos=False, special=True) == (
            tokenizer(text, add_special_tokens=False).input_ids
        )


def test_logits_are_those_of_the_packed_model_with_rounded_inputs(exported: tuple[Path, Path]) -> None:
    artifact, file = exported
    model, tokenizer, engine = load(artifact), load_tokenizer(artifact), Engine(file, exact_cache=True)
    texts = [ids for text in TEXTS if (ids := tokenizer(text).input_ids)]
    assert_near([(model, ids) for ids in texts], engine, file)


def test_what_rounding_costs_a_trained_model(trained: tuple[Path, Path]) -> None:
    """As anyone runs it: keys and values in half precision, inputs in 8 bits."""
    artifact, file = trained
    model, tokenizer, engine = load(artifact), load_tokenizer(artifact), Engine(file)
    write_corpus(artifact.parent / "heldout.jsonl", World(), n=20, seed=2)
    texts = [json.loads(line)["text"] for line in (artifact.parent / "heldout.jsonl").read_text().splitlines()]
    each = [tokenizer(text).input_ids[:250] for text in texts]
    assert torch.cat([kl(logits(model, ids), engine.logits(ids)) for ids in each]).mean() < COST


def test_greedy_tokens_are_those_of_the_packed_model(trained: tuple[Path, Path]) -> None:
    """Five prompts, 64 tokens; they may part only where the best two are closer than the engine's rounding."""
    artifact, file = trained
    model, tokenizer, engine = load(artifact), load_tokenizer(artifact), Engine(file)
    equal = 0
    for prompt in PROMPTS:
        start = tokenizer(prompt).input_ids
        with torch.inference_mode():
            ids = model.generate(
                torch.tensor([start]), attention_mask=torch.ones(1, len(start), dtype=torch.int64),
                max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0,
            )[0].tolist()  # fmt: skip
        packed, own = logits(model, ids), engine.logits(ids)
        for step in range(len(start) - 1, len(ids) - 1):
            if own[step].argmax() == packed[step].argmax():
                equal += 1
                continue
            best, second = packed[step].topk(2).values
            assert best - second <= 2 * (own[step] - packed[step]).abs().max()
    assert equal >= 0.97 * 64 * len(PROMPTS)


def test_the_chat_template_answers(trained: tuple[Path, Path]) -> None:
    """llama.cpp renders the file's template, stops at the end of the turn, and says what the packed model says."""
    artifact, file = trained
    model, tokenizer, engine = load(artifact), load_tokenizer(artifact), Engine(file)
    messages: Any = [{"role": "user", "content": "What is the capital of the north?"}]
    answer = engine.llama.create_chat_completion(messages, max_tokens=48, temperature=0.0)
    said = answer["choices"][0]["message"]["content"]
    prompt: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert answer["usage"]["prompt_tokens"] == prompt["input_ids"].shape[1]
    with torch.inference_mode():
        ids = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    wanted = tokenizer.decode(ids, skip_special_tokens=True)
    assert said
    assert said.split()[:3] == wanted.split()[:3]


# --- what the hyper-parameters do, on random models whose logits depend on every one of them

ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
# Rows of no whole block of 32 are F32 in GGUF, of which llama.cpp rounds nothing.
ODD = {"hidden_size": 80, "head_dim": 20, "intermediate_size": 172, "num_hidden_layers": 4}
EVEN = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 288, "num_hidden_layers": 4}
IDS = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)).tolist()


def assert_exact(folder: Path, family: str, *, bound: float = EXACT, **config: Any) -> None:
    artifact, file = tiny_artifact(folder / "artifact", family, **{**ODD, **config}), folder / "x.gguf"
    assert export(artifact, "gguf", file).exact
    engine = Engine(file, context=64, exact_cache=True)
    assert kl(logits(load(artifact), IDS), engine.logits(IDS)).mean() < bound


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs(tmp_path: Path, family: str, tied: bool) -> None:
    assert_exact(tmp_path, family, tie_word_embeddings=tied)


YARN = {**ROPE["yarn"], "beta_fast": 32.0, "beta_slow": 1.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 44}
PHI3 = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 512}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 20, "num_hidden_layers": 6, "sliding_window": 8}),
    "phi3": ("phi3", {}),
    "phi3, short": (
        "phi3",
        {
            "rope_parameters": {**PHI3, "short_factor": [1.0 + n / 8 for n in range(10)], "long_factor": [9.0] * 10},
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 2048,
        },
    ),
    "phi3, partial": ("phi3", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {"sliding_window": 8, "rope_parameters": {"sliding_attention": PLAIN, "full_attention": YARN}},
    ),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.25, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
            "logits_scaling": 2.0, "attention_bias": True, "mlp_bias": True,
        },
    ),
    "mixtral": ("mixtral", EXPERTS),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "gpt_oss": ("gpt_oss", {**EXPERTS, "sliding_window": 8, "rope_parameters": {**YARN, "truncate": True}}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_run(tmp_path: Path, name: str) -> None:
    """Whatever differs from Llama's block: windows, norms, scales, experts, sinks. Gemma's GELU is a table."""
    family, config = OTHERS[name]
    bound = 1e-5 if name == "gemma3" else EXACT
    assert_exact(tmp_path, family, bound=bound, tie_word_embeddings=False, **config)


@pytest.mark.parametrize("rope", ROPE)
def test_rotary_scaling(tmp_path: Path, rope: str) -> None:
    assert_exact(tmp_path, "llama", rope_parameters=ROPE[rope])


def test_biases_run(tmp_path: Path) -> None:
    assert_exact(tmp_path, "llama", attention_bias=True, mlp_bias=True)


def assert_near(texts: list[tuple[PreTrainedModel, list[int]]], engine: Engine, file: Path) -> None:
    """The engine is much nearer to the packed model with the inputs it rounds than that is to the packed model."""
    cost, apart = [], []
    for model, ids in texts:
        with rounded_inputs(model, file):
            rounded = logits(model, ids)
        cost.append(kl(logits(model, ids), rounded))
        apart.append(kl(rounded, engine.logits(ids)))
    assert torch.cat(apart).mean() < max(EXACT, NEAR * torch.cat(cost).mean())


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        (QuantScheme(bits=3), {}),
        (QuantScheme(bits=4), {}),
        (QuantScheme(bits=5), {}),
        (QuantScheme(bits=2, group_size=32), {}),
        (QuantScheme(bits=2, grid="sym"), {}),
        (QuantScheme(bits=2, grid="sym"), {"tq2_0": True}),
        (QuantScheme(bits=2, grid="q2_0"), {"tq2_0": True}),
        (QuantScheme(bits=2, grid="affine"), {}),
    ],
    ids=str,
)
def test_every_block_type_runs(tmp_path: Path, scheme: QuantScheme, options: dict[str, Any]) -> None:
    artifact, file = tiny_artifact(tmp_path / "artifact", scheme=scheme, **EVEN), tmp_path / "x.gguf"
    assert export(artifact, "gguf", file, options=options).exact
    assert_near([(load(artifact), IDS)], Engine(file, context=64, exact_cache=True), file)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_embeddings_run(tmp_path: Path, bits: int) -> None:
    artifact, file = tiny_artifact(tmp_path / "artifact", embeddings_bits=bits, **EVEN), tmp_path / "x.gguf"
    assert export(artifact, "gguf", file).exact
    assert_near([(load(artifact), IDS)], Engine(file, context=64, exact_cache=True), file)

"""llama.cpp runs what UPQ exports: the same logits, tokens and chat. `make test-engines` sets it up."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
from tiny import artifact_of, tiny_artifact  # noqa: E402
from upq.demo import REFERENCE  # noqa: E402
from upq.exports import export  # noqa: E402
from upq.loading import load_tokenizer  # noqa: E402
from upq.models import FAMILIES  # noqa: E402
from upq.scheme import QuantScheme  # noqa: E402

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
KLD = 1e-3  # nats: what int8 activations may cost


class Engine:
    """A GGUF file in llama.cpp, on one thread."""

    def __init__(self, file: Path, context: int = 512) -> None:
        self.llama = llama_cpp.Llama(str(file), n_ctx=context, n_threads=1, logits_all=True, verbose=False)

    def logits(self, ids: list[int]) -> Tensor:
        self.llama.reset()
        self.llama.eval(ids)
        return torch.from_numpy(np.array(self.llama.scores[: len(ids)]))

    def tokenize(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)


def kl(model: PreTrainedModel, engine: Engine, ids: list[int]) -> Tensor:
    """KL(packed ‖ engine) of each token."""
    with torch.inference_mode():
        p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    q = engine.logits(ids).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.fixture(scope="module", params=["reference", "stories260K"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A real model, artefact and GGUF."""
    source = {"reference": REFERENCE, "stories260K": STORIES}[request.param]
    if not source.is_dir():
        pytest.skip(f"{source} is not here")
    folder = tmp_path_factory.mktemp(request.param)
    artifact = artifact_of(folder / "artifact", source)
    report = export(artifact, "gguf", folder / "model.gguf")
    assert report.exact
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


def test_logits_are_those_of_the_packed_model(exported: tuple[Path, Path]) -> None:
    """KL of whole texts; the rest of the difference is llama.cpp's int8 activations."""
    model, tokenizer, engine = (
        upq.load(exported[0], dtype=torch.float32),
        load_tokenizer(exported[0]),
        Engine(exported[1]),
    )
    divergence = torch.cat([kl(model, engine, ids) for text in TEXTS if (ids := tokenizer(text).input_ids)])
    assert divergence.mean() < KLD, divergence.mean()


def test_greedy_tokens_are_those_of_the_packed_model(exported: tuple[Path, Path]) -> None:
    """Five prompts, 64 tokens; they may part only where the best two are closer than the engine's rounding."""
    model, tokenizer, engine = (
        upq.load(exported[0], dtype=torch.float32),
        load_tokenizer(exported[0]),
        Engine(exported[1]),
    )
    equal = 0
    for prompt in PROMPTS:
        start = tokenizer(prompt).input_ids
        with torch.inference_mode():
            ids = model.generate(
                torch.tensor([start]), attention_mask=torch.ones(1, len(start), dtype=torch.int64),
                max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0,
            )[0].tolist()  # fmt: skip
            packed = model(torch.tensor([ids])).logits[0]
        own = engine.logits(ids)
        for step in range(len(start) - 1, len(ids) - 1):
            if own[step].argmax() == packed[step].argmax():
                equal += 1
                continue
            best, second = packed[step].topk(2).values
            rounding = (own[step] - packed[step]).abs().max()
            assert best - second <= 2 * rounding
            assert rounding < 0.25
    assert equal >= 0.97 * 64 * len(PROMPTS)


def test_the_chat_template_answers(exported: tuple[Path, Path]) -> None:
    """llama.cpp renders the file's template, stops at the end of the turn, and says what the packed model says."""
    tokenizer = load_tokenizer(exported[0])
    if not getattr(tokenizer, "chat_template", None):
        pytest.skip("no chat model")
    model = upq.load(exported[0], dtype=torch.float32)
    engine = Engine(exported[1])
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
SHAPE = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 4, "intermediate_size": 288}


@pytest.fixture
def differs(tmp_path: Path) -> Callable[..., float]:
    """Mean KL of llama.cpp from the packed model, for a random model of these options."""

    def measure(family: str, *, options: dict[str, Any] | None = None, **config: Any) -> float:
        artifact = tiny_artifact(tmp_path / "artifact", family, **{**SHAPE, **config})
        assert export(artifact, "gguf", tmp_path / "x.gguf", options=options).exact
        model = upq.load(artifact, dtype=torch.float32)
        ids = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)).tolist()
        return kl(model, Engine(tmp_path / "x.gguf", context=64), ids).mean().item()

    return measure


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES.names())
def test_every_family_runs(differs: Callable[..., float], family: str, tied: bool) -> None:
    assert differs(family, tie_word_embeddings=tied) < KLD


@pytest.mark.parametrize("rope", ROPE)
def test_rotary_scaling(differs: Callable[..., float], rope: str) -> None:
    assert differs("llama", rope_parameters=ROPE[rope]) < KLD


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
def test_every_block_type_runs(differs: Callable[..., float], scheme: QuantScheme, options: dict[str, Any]) -> None:
    assert differs("llama", scheme=scheme, options=options) < KLD


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_embeddings_run(differs: Callable[..., float], bits: int) -> None:
    assert differs("llama", embeddings_bits=bits) < KLD


def test_biases_run(differs: Callable[..., float]) -> None:
    assert differs("llama", attention_bias=True, mlp_bias=True) < KLD

"""Small stand-ins for what tests would otherwise download."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from upq.artifact.manifest import Manifest, SourceModel
from upq.artifact.transformers import write_artifact
from upq.core.scheme import QuantScheme
from upq.grids import GRIDS, search_scale
from upq.model.loading import load_model, load_tokenizer
from upq.model.matrices import Matrix
from upq.nn.blocks import model_weights

# One block for all: Llama's, with biases, norms on heads or positions left out.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(
    *, bos: str | None = None, eos: str | None = None, chat_template: str | None = None, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0..255 in the order of the byte-level alphabet), then `bos` and `eos` where given.

    `adds_bos`: it puts its own BOS in front when asked for special tokens, as Llama's does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = [token for token in dict.fromkeys((bos, eos)) if token]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos:
        assert bos is not None
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=chat_template)


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal LM of `family`: two blocks, odd widths, biases and norms that are not all equal."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "vocab_size": 67,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **{**shape, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tiny_artifact(
    out: Path,
    family: str = "llama",
    *,
    scheme: QuantScheme | None = None,
    dtype: torch.dtype = torch.float32,
    embeddings_bits: Any = None,
    **overrides: Any,
) -> Path:
    """An artefact as `upq quantize` leaves it, of a random model: every linear of the blocks on `scheme`.

    The same arguments are built once a session; `out` is a copy, and the test's own.
    """
    key = repr((family, scheme, dtype, embeddings_bits, sorted(overrides.items())))
    built = Path(_session_folder().name) / hashlib.sha256(key.encode()).hexdigest()
    if not built.exists():
        scratch = built.with_suffix(".new")
        _build(scratch, family, scheme, dtype, embeddings_bits, overrides)
        scratch.rename(built)
    torch.manual_seed(0)  # the same random state, built or copied
    return Path(shutil.copytree(built, out))


@cache
def _session_folder() -> tempfile.TemporaryDirectory[str]:
    """Goes when this process ends."""
    return tempfile.TemporaryDirectory(prefix="artefacts")


def _build(
    out: Path, family: str, scheme: QuantScheme | None, dtype: torch.dtype, embeddings_bits: Any, overrides: Any
) -> None:
    model = tiny_model(family, **{"vocab_size": 300, "eos_token_id": 257, **overrides}).to(dtype)
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT, adds_bos=True)
    artifact_of_model(out, model, tokenizer, scheme=scheme, embeddings_bits=embeddings_bits)


def artifact_of(out: Path, source: Path, *, scheme: QuantScheme | None = None, embeddings_bits: Any = None) -> Path:
    """An artefact of a model on disk, its weights rounded to the nearest level."""
    tokenizer = load_tokenizer(source) if (source / "tokenizer_config.json").is_file() else None
    return artifact_of_model(out, load_model(source), tokenizer, scheme=scheme, embeddings_bits=embeddings_bits)


def artifact_of_model(
    out: Path,
    model: Any,
    tokenizer: Any,
    *,
    scheme: QuantScheme | None = None,
    embeddings_bits: Any = None,
    **rounded: Any,
) -> Path:
    """`rounded`: how it rounds activations, as write_artifact takes it."""
    scheme = scheme or QuantScheme(bits=2)
    grid, qtensors = GRIDS.get(scheme.grid), {}
    for path, matrix in model_weights(model).items():
        assert isinstance(matrix, Matrix)
        parameter = path if matrix.experts else f"{path}.weight"
        weight = matrix.flat(model.get_parameter(parameter).detach()).float()
        qtensors[path] = grid.freeze(weight, search_scale(weight, scheme), scheme)
    out.mkdir(parents=True)
    manifest = Manifest(model=SourceModel(path="org/tiny", digest="0"))
    bits = embeddings_bits
    write_artifact(out, model, qtensors, manifest=manifest, tokenizer=tokenizer, embeddings_bits=bits, **rounded)
    return out

"""Train the demonstration's model: documents first, then conversations, in about two minutes on two CPU cores.

Shape suffixes: N = rows, T = tokens of a row, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from upq.data.world import Message, World, conversations, documents
from upq.demo.tokenizer import train_tokenizer
from upq.errors import UPQError
from upq.progress import Progress, Silent
from upq.recipe import digest

SETTINGS_FILE = "demo.json"
_IGNORED = -100  # label of a token that is context only
_TOKENIZER_TEXTS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What the model is and how long it learns. A step count, not a clock, ends the training."""

    seed: int = 0
    world_size: int = 12
    vocab_size: int = 768
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    rope_theta: float = 500.0  # short rows: heads that look one token back form sooner than at 10,000
    seq_len: int = 128
    batch_size: int = 16
    echo_steps: int = 150
    document_steps: int = 800
    conversation_steps: int = 650
    matrix_lr: float = 0.02  # Muon: everything inside the blocks
    vector_lr: float = 3e-3  # AdamW: embeddings and norms
    init_std: float = 0.08
    warmup: float = 0.05  # share of the steps

    def __post_init__(self) -> None:
        if min(self.steps.values()) < 1:
            raise UPQError("the demo model needs at least one step in each stage of its training")

    @property
    def steps(self) -> dict[str, int]:
        """The stages in order. Echoes come first: all else is learned sooner by a model that can copy already."""
        return {
            "echoes": self.echo_steps,
            "documents": self.document_steps,
            "conversations": self.conversation_steps,
        }

    @property
    def world(self) -> World:
        return World(self.seed, self.world_size)


def train_demo_model(out: Path, *, config: DemoConfig = DemoConfig(), progress: Progress | None = None) -> Path:
    """A Hugging Face directory at `out` (safetensors, float32) with tokenizer and chat template.

    Does nothing if `out` already holds the model of this configuration; any other content is an error.
    """
    progress = progress or Silent()
    identity = _identity(config)
    if _already_there(out, identity):
        progress.note(f"demo model: {out} is complete")
        return out
    per_step = float(config.batch_size * config.seq_len)
    progress.plan({stage: (steps, steps * per_step) for stage, steps in config.steps.items()})
    tokenizer, stages = _prepare(config)
    model = _train(config, stages, len(tokenizer), progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / SETTINGS_FILE).write_text(json.dumps({"digest": identity, **dataclasses.asdict(config)}, indent=1))
        temporary.chmod(0o755)  # mkdtemp's directory is private
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _identity(config: DemoConfig) -> str:
    """The settings and a sample of the text: new wordings make a new model."""
    sample = [list(documents(config.world, 50, config.seed)), list(conversations(config.world, 50, config.seed))]
    return digest(dataclasses.asdict(config), sample)


def _already_there(out: Path, identity: str) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    settings = out / SETTINGS_FILE
    if not settings.is_file():
        raise UPQError(f"{out}: exists and holds no demo model; choose another directory")
    if json.loads(settings.read_text()).get("digest") != identity:
        raise UPQError(f"{out}: holds a demo model of other settings; remove it or choose another directory")
    return True


# ---- rows of tokens


@dataclass(frozen=True, slots=True)
class Rows:
    ids_NT: Tensor  # int64
    labels_NT: Tensor  # the ids, or _IGNORED where nothing is learned


def _prepare(config: DemoConfig) -> tuple[PreTrainedTokenizerFast, dict[str, Rows]]:
    """The tokenizer, and for each stage exactly the rows that its steps need: no text is seen twice."""
    world, seed = config.world, config.seed
    tokenizer = train_tokenizer(
        documents(world, _TOKENIZER_TEXTS, seed),
        conversations(world, _TOKENIZER_TEXTS, seed),
        vocab_size=config.vocab_size,
    )
    rows = {stage: steps * config.batch_size for stage, steps in config.steps.items()}
    # A text is more than one token, so a text for each token is more than enough; only what is needed is generated.
    enough = {stage: n * config.seq_len for stage, n in rows.items()}
    echoes = documents(world, enough["echoes"], seed + 1, forms=("echo",))
    texts = documents(world, enough["documents"], seed + 2)
    talks = conversations(world, enough["conversations"], seed + 3)
    return tokenizer, {
        "echoes": _stream_rows(echoes, tokenizer, rows["echoes"], config.seq_len),
        "documents": _stream_rows(texts, tokenizer, rows["documents"], config.seq_len),
        "conversations": _packed_rows(talks, tokenizer, rows["conversations"], config.seq_len),
    }


def _stream_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, n: int, length: int) -> Rows:
    """Documents end to end, cut into rows; every token is learned."""
    bos, eos = _id(tokenizer.bos_token_id), _id(tokenizer.eos_token_id)
    texts, stream = iter(texts), list[int]()
    while len(stream) < n * length:
        batch = list(islice(texts, 512))
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            stream += [bos, *ids, eos]
    ids_NT = torch.tensor(stream[: n * length]).view(n, length)
    return Rows(ids_NT, ids_NT)


def _packed_rows(talks: Iterable[list[Message]], tokenizer: PreTrainedTokenizerFast, n: int, length: int) -> Rows:
    """Whole conversations, as many as fit a row; only what the assistant says is learned."""
    ids_NT = torch.full((n, length), _id(tokenizer.pad_token_id))
    labels_NT = torch.full((n, length), _IGNORED)
    talks = iter(talks)
    row = at = 0
    while row < n:
        batch: Any = tokenizer.apply_chat_template(
            list(islice(talks, 256)), return_dict=True, return_assistant_tokens_mask=True
        )
        for ids, spoken in zip(batch["input_ids"], batch["assistant_masks"], strict=True):
            size = len(ids)
            if size > length:
                continue
            if at + size > length:
                row, at = row + 1, 0
            if row == n:
                break
            tokens = torch.tensor(ids)
            ids_NT[row, at : at + size] = tokens
            labels_NT[row, at : at + size] = torch.where(torch.tensor(spoken).bool(), tokens, _IGNORED)
            at += size
    return Rows(ids_NT, labels_NT)


def _id(token: object) -> int:
    assert isinstance(token, int)
    return token


# ---- training


def _train(config: DemoConfig, stages: dict[str, Rows], vocab_size: int, progress: Progress) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: LlamaForCausalLM = LlamaForCausalLM(_llama(config, vocab_size))
    model.train()
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    # With AdamW alone the model does not learn to copy a word from its prompt in this time; with Muon it does.
    muon = torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=0.01)
    adam = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in inside], betas=(0.9, 0.95), weight_decay=0.0
    )
    total = sum(config.steps.values())
    step = 0
    for stage, rows in stages.items():
        progress.start(stage)
        batches = zip(
            torch.split(rows.ids_NT, config.batch_size), torch.split(rows.labels_NT, config.batch_size), strict=True
        )
        for ids_NT, labels_NT in batches:
            scale = _schedule(step, total, config.warmup)
            logits_NTV = model(input_ids=ids_NT, use_cache=False).logits
            loss = F.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), labels_NT[:, 1:].flatten(), ignore_index=_IGNORED)
            torch.autograd.backward(loss)
            for optimizer, rate in ((muon, config.matrix_lr), (adam, config.vector_lr)):
                optimizer.param_groups[0]["lr"] = rate * scale
                optimizer.step()  # type: ignore[no-untyped-call]
                optimizer.zero_grad()
            progress.advance(loss=loss.item())
            step += 1
    return model


def _llama(config: DemoConfig, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=3,
        initializer_range=config.init_std,
    )


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then half a cosine to zero over both stages."""
    ramp = max(1, int(total * warmup))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))

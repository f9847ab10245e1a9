"""Train the reference model that UPQ ships: documents first, then conversations. `python tools/train_reference.py`

A Llama of 3.3 million parameters, small enough for two CPU cores and large enough to know the invented world
(`upq.world`) and to follow orders. The same command goes on after an interruption; a finished model stays.

Shape suffixes: N = rows, T = tokens of a row, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from upq.core.config import digest
from upq.core.errors import UPQError
from upq.core.progress import Progress
from upq.files.atomic import atomic_write, written
from upq.files.tensors import load_tensors, save_tensors
from upq.run.quiet import quiet_libraries
from upq.run.reporter import reporter
from upq.world import Message, World, conversations, documents

ROOT = Path(__file__).resolve().parents[1]
BOS, PAD, TURN, END = "<|begin|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
RECORD = "training.json"
_TOKENIZER_TEXTS = 20_000

# `generation` marks what an assistant says: training on answers alone needs no second renderer.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the model is and how long it learns. A step count, not a clock, ends the training."""

    seed: int = 0
    world_size: int = 900
    vocab_size: int = 1536
    hidden_size: int = 256
    intermediate_size: int = 512
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    rope_theta: float = 500.0  # short rows: heads that look one token back form sooner than at 10,000
    max_position_embeddings: int = 512
    seq_len: int = 256
    batch_size: int = 16
    document_steps: int = 4400
    conversation_steps: int = 2200
    replay: float = 0.25  # share of documents among the rows of the last stage: what was learned stays
    user_weight: float = 0.25  # of a token that the user says: enough to learn how users talk, too
    matrix_lr: float = 0.02  # Muon: everything inside the blocks
    vector_lr: float = 3e-3  # AdamW: embeddings and norms
    weight_decay: float = 0.01
    init_std: float = 0.05
    warmup: float = 0.05  # share of the steps

    @property
    def steps(self) -> dict[str, int]:
        """The stages in order."""
        return {"documents": self.document_steps, "conversations": self.conversation_steps}

    @property
    def world(self) -> World:
        return World(self.seed, self.world_size)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Where the finished model goes.")] = ROOT / "src/upq/world/reference",
    work: Annotated[Path, typer.Option(help="Checkpoints of an unfinished run.")] = ROOT / "runs/reference",
    override: Annotated[list[str], typer.Option("--set", help="KEY=VALUE of the configuration.")] = [],  # noqa: B006
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    score: Annotated[bool, typer.Option(help="Put mini_mmlu and mini_ifeval to the finished model.")] = True,
) -> None:
    """Train, or go on training, and write a Hugging Face directory in bf16 with the record of the run."""
    quiet_libraries()
    try:
        config = parse(override)
        if not is_complete(out, config):
            make(config, out, work, device, every)
    except UPQError as error:
        raise SystemExit(f"error: {error}") from None
    if score:
        record_scores(out)
    Console().print(f"{out} is complete")


def parse(override: list[str]) -> Config:
    known = {field.name for field in dataclasses.fields(Config)}
    values = {}
    for item in override:
        key, _, value = item.partition("=")
        if key not in known:
            raise UPQError(f"--set {item}: no such key; there are {', '.join(sorted(known))}")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            raise UPQError(f"--set {item}: not a number") from None
    return Config(**values)


def is_complete(out: Path, config: Config) -> bool:
    """Another model's place is not taken: it would be found out after an hour of training."""
    if not (out / RECORD).is_file():
        return False
    if json.loads((out / RECORD).read_text())["config"] != dataclasses.asdict(config):
        raise UPQError(f"{out}: holds a model of another configuration; remove it or give another --out")
    return True


def make(config: Config, out: Path, work: Path, device: str, every: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(config)
    with reporter(Console()) as progress:
        model, record = train(config, tokenizer, work / "checkpoint.safetensors", device, every, progress)
    with written(out) as folder:
        model.to("cpu", torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_record(folder, record)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    atomic_write(folder / RECORD, json.dumps(record, indent=1) + "\n")


def record_scores(out: Path) -> None:
    """Both tests, mini_mmlu by subject too, into the record; they need lm-eval."""
    from upq.evals import evaluate_tasks
    from upq.model.loading import load_model, load_tokenizer
    from upq.world import AREAS

    tasks = ["mini_mmlu", *(f"mini_mmlu_{area}" for area in AREAS), "mini_ifeval"]
    scores = evaluate_tasks(load_model(out), load_tokenizer(out), tasks, batch_size=64)
    rounded = {task: {name: round(value, 4) for name, value in found.items()} for task, found in scores.items()}
    write_record(out, json.loads((out / RECORD).read_text()) | {"scores": rounded})


def train_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the world's own text, special tokens first; the same text gives the same tokenizer."""
    texts = chain(
        documents(config.world, _TOKENIZER_TEXTS, config.seed),
        (m["content"] for talk in conversations(config.world, _TOKENIZER_TEXTS, config.seed) for m in talk),
        ("user", "assistant"),
    )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[BOS, PAD, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


# ---- rows of tokens


@dataclass(frozen=True, slots=True)
class Rows:
    ids_NT: Tensor  # int64
    weights_NT: Tensor  # float32, what each token counts in the loss


def stage_rows(config: Config, stage: str, tokenizer: PreTrainedTokenizerFast) -> Rows:
    """Exactly the rows that the steps of a stage need: no text is seen twice."""
    world, seed, n = config.world, config.seed, config.steps[stage] * config.batch_size
    # A text is more than one token, so a text for each token is more than enough; only what is needed is generated.
    enough = n * config.seq_len
    if stage == "documents":
        return stream_rows(documents(world, enough, seed + 2), tokenizer, n, config.seq_len)
    replayed = int(n * config.replay)
    talks = conversations(world, enough, seed + 3)
    talk = packed_rows(talks, tokenizer, n - replayed, config.seq_len, config.user_weight)
    text = stream_rows(documents(world, enough, seed + 4), tokenizer, replayed, config.seq_len)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return Rows(
        torch.cat([talk.ids_NT, text.ids_NT])[order],
        torch.cat([talk.weights_NT, text.weights_NT])[order],
    )


def stream_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, n: int, length: int) -> Rows:
    """Documents end to end, cut into rows; every token is learned."""
    texts, stream = iter(texts), list[int]()
    while len(stream) < n * length:
        batch = list(islice(texts, 512))
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    ids_NT = torch.tensor(stream[: n * length]).view(n, length)
    return Rows(ids_NT, torch.ones(n, length))


def packed_rows(
    talks: Iterable[list[Message]], tokenizer: PreTrainedTokenizerFast, n: int, length: int, user_weight: float
) -> Rows:
    """Whole conversations, as many as fit a row; what the assistant says counts 1, the rest `user_weight`."""
    ids_NT = torch.full((n, length), tokenizer.pad_token_id)
    weights_NT = torch.zeros(n, length)
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
            ids_NT[row, at : at + size] = torch.tensor(ids)
            weights_NT[row, at : at + size] = torch.tensor(spoken).float().clamp(min=user_weight)
            at += size
    return Rows(ids_NT, weights_NT)


# ---- training


def train(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    checkpoint: Path,
    device: str,
    every: int,
    progress: Progress,
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """The trained model, and the record of the run: configuration, tokens, seconds and the curve of the loss."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(llama(config, tokenizer)).to(device)
    model.train()
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    # AdamW alone does not teach a model of this size to copy a word from its prompt in this time; Muon does.
    muon = torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=config.weight_decay)
    adam = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in inside], lr=config.vector_lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    optimizers = {"muon": (muon, config.matrix_lr), "adam": (adam, config.vector_lr)}
    identity = {"config": dataclasses.asdict(config), "tokenizer": digest(tokenizer.backend_tokenizer.to_str())}
    step, seconds, curve = load_checkpoint(checkpoint, identity, model, optimizers)
    total, at = sum(config.steps.values()), 0
    per_step = float(config.batch_size * config.seq_len)
    progress.plan({stage: (steps, steps * per_step) for stage, steps in config.steps.items()})
    for stage, steps in config.steps.items():
        first, at = at, at + steps
        progress.start(stage, done=min(max(0, step - first), steps))
        if step >= at:
            continue
        rows = stage_rows(config, stage, tokenizer)
        began = time.monotonic() - seconds
        for ids_NT, weights_NT in batches(rows, config.batch_size, step - first):
            loss = train_step(model, ids_NT.to(device), weights_NT.to(device))
            scale = schedule(step, total, config.warmup)
            for optimizer, rate in optimizers.values():
                optimizer.param_groups[0]["lr"] = rate * scale
                optimizer.step()
                optimizer.zero_grad()
            progress.advance(loss=loss)
            step += 1
            seconds = time.monotonic() - began
            if step % 20 == 0:
                curve.append((step, round(loss, 4)))
            if step % every == 0:
                save_checkpoint(checkpoint, identity, model, optimizers, step, seconds, curve)
        save_checkpoint(checkpoint, identity, model, optimizers, step, seconds, curve)
    record = {
        "config": dataclasses.asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": {stage: int(steps * per_step) for stage, steps in config.steps.items()},
        "seconds": round(seconds),
        "device": device,
        "torch": torch.__version__,
        "loss": curve,
    }
    return model, record


def batches(rows: Rows, size: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
    pairs = zip(torch.split(rows.ids_NT, size), torch.split(rows.weights_NT, size), strict=True)
    return islice(pairs, done, None)


def train_step(model: LlamaForCausalLM, ids_NT: Tensor, weights_NT: Tensor) -> float:
    """Backward pass of the weighted mean of the tokens' cross-entropy, which is returned, in nats."""
    logits_NTV = model(input_ids=ids_NT, use_cache=False).logits
    losses = F.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), ids_NT[:, 1:].flatten(), reduction="none")
    weights = weights_NT[:, 1:].flatten()
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    return loss.item()


def llama(config: Config, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=config.init_std,
    )


def schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then half a cosine to zero over all stages."""
    ramp = max(1, int(total * warmup))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


# ---- checkpoints: one safetensors file, no pickle

Optimizers = dict[str, tuple[torch.optim.Optimizer, float]]


def save_checkpoint(
    path: Path,
    identity: dict[str, Any],
    model: LlamaForCausalLM,
    optimizers: Optimizers,
    step: int,
    seconds: float,
    curve: list[tuple[int, float]],
) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, (optimizer, _) in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
    note = {"identity": identity, "step": step, "seconds": seconds, "curve": curve}
    save_tensors(path, tensors, note)


def load_checkpoint(
    path: Path, identity: dict[str, Any], model: LlamaForCausalLM, optimizers: Optimizers
) -> tuple[int, float, list[tuple[int, float]]]:
    """Steps done, seconds spent and the curve so far."""
    if not path.is_file():
        return 0, 0.0, []
    tensors, note = load_tensors(path)
    # The tokenizer is learned from the world's text: another one means that the world is another.
    if note["identity"] != identity:
        raise UPQError(f"{path}: an unfinished run of another configuration or world; remove it or give another --work")
    parameters = dict(model.named_parameters())
    states: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in optimizers}
    with torch.no_grad():
        for name, tensor in tensors.items():
            owner, _, rest = name.partition(".")
            if owner == "model":
                parameters[rest].copy_(tensor)
            else:
                index, _, key = rest.partition(".")
                states[owner].setdefault(int(index), {})[key] = tensor
    for name, (optimizer, _) in optimizers.items():
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states[name]})
    return note["step"], note["seconds"], [tuple(point) for point in note["curve"]]


if __name__ == "__main__":
    app()

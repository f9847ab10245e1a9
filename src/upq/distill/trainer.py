"""The training loop of the INT2 stage. One process, torchrun and FSDP run this same code through accelerate."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from upq.core.config import Plugin
from upq.core.errors import UPQError
from upq.core.precision import computes_in_bf16
from upq.core.progress import Progress
from upq.core.signals import Stop, Stopped
from upq.distill.config import Distill, TrainingSettings
from upq.distill.objective import Objective
from upq.distill.optimizer import make_optimizer, plain, restored, set_rate
from upq.distill.sharding import shard
from upq.distill.student import checkpoint_blocks, norm_weight, norms, trained_linears
from upq.distill.teacher import CachedTeacher, StreamedTeacher, Teacher
from upq.files.metrics import NOWHERE, Metrics
from upq.files.tensors import keys_required, load_metadata, load_tensors, save_tensors
from upq.grids import ZERO
from upq.losses import LOSSES, Loss
from upq.model.head import Head
from upq.model.layout import layout_of
from upq.nn.fake_quant import FakeQuantLinear, rms
from upq.nn.ms_eden import Backward, Draws
from upq.nn.trained import full_tensor


class Batches(Protocol):
    """Training rows as a pure function of the step, so that a resumed run sees the batches it would have seen."""

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) int64 and mask (B, T) bool: True where a token is a target."""
        ...

    def rows(self, step: int, size: int) -> Tensor:
        """Numbers (B,) of the batch's rows: the same number is the same row, in any step."""
        ...


def steps(config: Distill, seq_len: int) -> int:
    """Optimiser steps that the token budget pays for; `seq_len` is the run's, where the training has no own."""
    return config.tokens // (config.batch_size * (config.seq_len or seq_len))


def learning_rate_factor(step: int, total: int, config: TrainingSettings) -> float:
    """Linear warm-up, then a cosine from 1 to `final_lr`; a pure function of the step."""
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def distill(
    student: PreTrainedModel,
    teacher: Teacher,
    data: Batches,
    config: TrainingSettings,
    *,
    total_steps: int,
    checkpoint: Path,
    progress: Progress,
    sharded: bool = False,
    stop: Stop | None = None,
    name: str = "distill",
    metrics: Metrics = NOWHERE,
    loss_of: Callable[[int], Loss | None] | None = None,
    figures: Callable[[int], Mapping[str, float]] | None = None,
) -> list[float]:
    """Train `student` in place; returns the loss of each step (nats a token) since the last resume.

    Several processes (torchrun) share each batch. `sharded` cuts weights, gradients and moments over them, teacher
    included (FSDP2); else each has a copy of its own. Both take up each other's checkpoints.

    Every `checkpoint_every` steps the latents, scales and optimiser moments go to `checkpoint`, atomically; a later
    call goes on from there. A step whose loss or gradient is not finite changes nothing; `skip_bad_steps` of them are
    left out, one more is an UPQError. That, and a `stop` that waits, which raises Stopped after a step,
    come once the state is in `checkpoint`. Each step has a line of `metrics`.

    `loss_of`: by step; None is the configuration's. `figures`: what a step's line has of its batch; without it, the
    tokens so far.
    """
    training, stop = Training(student, teacher, data, config, sharded=sharded, loss_of=loss_of), stop or Stop()
    first, skipped = _resume(checkpoint, training, progress) if checkpoint.is_file() else (0, [])
    metrics.begin("step", first)
    progress.start(name, done=first)
    losses: list[float] = []
    for step in range(first, total_steps):
        began, factor = time.monotonic(), learning_rate_factor(step, total_steps, config)
        value, norm, stopping = training.step(step, factor, stop)
        if not (math.isfinite(value) and math.isfinite(norm)):
            wrong = f"the loss is {value}" if not math.isfinite(value) else f"the gradient's norm is {norm}"
            if len(skipped) == config.skip_bad_steps:
                if step > first:
                    _save(checkpoint, training, step, skipped)
                kept = f"; the state before it is kept in {checkpoint}" if checkpoint.is_file() else ""
                raise UPQError(
                    f"{name}: step {step}: {wrong}; raise {name}.skip_bad_steps (now {config.skip_bad_steps}) to go "
                    f"on without it, or lower {name}.lr or {name}.scale_lr with another --out{kept}"
                )
            skipped.append(step)
            progress.note(f"{name}: step {step} is left out: {wrong} ({len(skipped)} of {config.skip_bad_steps})")
        losses.append(value)
        finished = step + 1
        saves = finished % config.checkpoint_every == 0 or finished == total_steps or stopping
        metrics.append(
            "step",
            step,
            durable=saves,
            **({"tokens": finished * training.tokens} if figures is None else figures(step)),
            loss=value,
            lr=factor * training.rate,
            grad_norm=norm,
            seconds=round(time.monotonic() - began, 3),
        )
        if saves:
            _save(checkpoint, training, finished, skipped)
        progress.advance(1, loss=value)
        if stopping:
            progress.note(f"{name}: stopped after step {step}; its state is in {checkpoint}")
            raise Stopped(stop.signum or signal.SIGTERM)  # another process's, under torchrun
    return losses


class Training:
    """Everything of a training but its loop: objective and optimiser over the processes, and one step of them."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        data: Batches,
        config: TrainingSettings,
        *,
        sharded: bool = False,
        loss_of: Callable[[int], Loss | None] | None = None,
    ) -> None:
        self.config, self._data = config, data
        self.tokens = 0  # of a step, over all processes
        width = student.config.get_text_config(decoder=True).hidden_size
        self.rate = config.learning_rate(width) if config.train_weights else config.scale_lr  # at its largest
        self._bf16 = computes_in_bf16(config.precision, student.device, width)
        # The types are torch's own autocast's: accelerate keeps one choice a process, and a second training may differ.
        self.accelerator = Accelerator(
            mixed_precision="no",
            cpu=student.device.type == "cpu",
            device_placement=False,  # the student is where it is to be
        )
        loss = make_loss(config, teacher, data)
        self._cache = teacher if isinstance(teacher, CachedTeacher) else None
        needed = loss.uses_teacher or config.hidden
        taught = teacher if needed and not isinstance(teacher, CachedTeacher) else None
        if config.gradient_checkpointing:
            checkpoint_blocks(student)
        if not config.train_zeros:
            for layer in trained_linears(student).values():
                if ZERO in layer.grid_params:
                    layer.grid_params[ZERO].requires_grad_(False)
        self._draws = Draws()
        if config.backward == "nvfp4":
            for place, layer in enumerate(trained_linears(student).values()):
                layer.backward = Backward(self._draws, place << 16)
        objective = Objective(student, taught, loss, chunk=config.chunk_tokens, hidden=config.hidden)
        self._loss_of: Callable[[int], Loss] = lambda step: (loss_of(step) if loss_of else None) or loss
        self._own = objective
        sharded = sharded and self.accelerator.num_processes > 1
        if sharded:
            shard(objective, self.accelerator.device.type)
        groups = _groups(student, config, width)
        self._rates = [group["lr"] for group in groups]
        optimizer = make_optimizer(config, groups, student.device)
        self.objective: nn.Module = objective if sharded else self.accelerator.prepare(objective)
        self.optimizer: Any = self.accelerator.prepare(optimizer)
        self.learned = [p for p in self.objective.parameters() if p.requires_grad]

    def step(self, step: int, factor: float, stop: Stop) -> tuple[float, float, bool]:
        """Optimiser step number `step` on this process's share of its batch, at `factor` times the rates.

        Returns, equal in all processes, the mean loss a token, the norm of the gradient and whether any is to stop. If
        one of the two figures is not finite, nothing has changed.
        """
        config, accelerator = self.config, self.accelerator
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            set_rate(group, rate * factor)
        self._own.loss = self._loss_of(step)
        batch: tuple[Tensor, ...] = self._data.batch(step, config.batch_size)
        self.tokens = batch[0].numel()
        if self._cache is not None:
            batch = (*batch, self._data.rows(step, config.batch_size))
        targets = int(batch[1][:, 1:].sum())
        rank, world = accelerator.process_index, accelerator.num_processes
        mine = list(zip(*(torch.split(x[rank::world], config.micro_batch_size) for x in batch), strict=True))
        total = torch.zeros((), device=accelerator.device)
        for i, (tokens, mask, *rows) in enumerate(mine):
            cached = [] if self._cache is None else [self._cache.read(rows[0].tolist()).to(accelerator.device)]
            last = i == len(mine) - 1
            self._draws.begin(step, i, rank)
            # Gradients are averaged over processes, so each is scaled up: the sum is over the whole global batch.
            # Shards have nothing to put off: their gradients are summed up where they lie.
            with nullcontext() if last else accelerator.no_sync(self.objective):
                with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=self._bf16):
                    value = (
                        self.objective(tokens.to(accelerator.device), mask.to(accelerator.device), *cached) / targets
                    )
                accelerator.backward(value * world)
            total += value.detach()
        norm = float(full_tensor(accelerator.clip_grad_norm_(self.learned, config.clip)))
        asked = torch.full_like(total, stop.signum is not None)
        value, stopping = accelerator.reduce(torch.stack([total, asked]), reduction="sum").tolist()
        if math.isfinite(value) and math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, norm, stopping > 0


def skipped_steps(checkpoint: Path) -> list[int]:
    """The steps that were left out up to `checkpoint`."""
    skipped: list[int] = load_metadata(checkpoint).get("skipped", [])
    return skipped


def make_loss(config: TrainingSettings, teacher: Teacher, data: Batches) -> Loss:
    config = settled(config, teacher, data)
    cls = LOSSES.get(config.loss.name)
    return cls(config.loss.options(cls.Config, f"distill.loss {config.loss.name}"))


def settled(config: TrainingSettings, teacher: Teacher, data: Batches) -> TrainingSettings:
    """With what the loss asks of the whole teacher measured, so that it can go: the confidence of `cakld`."""
    cls = LOSSES.get(config.loss.name)
    options = config.loss.options(cls.Config, f"distill.loss {config.loss.name}")
    if getattr(options, "confidence", 0.0) is not None:
        return config
    assert not isinstance(teacher, CachedTeacher), "settle the configuration while the teacher is at hand"
    options = options.model_copy(update={"confidence": confidence(teacher, data)})
    return config.model_copy(update={"loss": Plugin(name=config.loss.name, **options.model_dump())})


@torch.no_grad()
def confidence(teacher: PreTrainedModel | StreamedTeacher, data: Batches, *, rows: int = 16) -> float:
    """Mean probability that the teacher gives to the tokens of the first training rows."""
    tokens_BT, mask_BT = data.batch(0, rows)
    if isinstance(teacher, StreamedTeacher):
        (states_BTH,), head = teacher.states(tokens_BT, every_block=False), teacher.head
    else:
        layout = layout_of(teacher)
        decoder, head = teacher.get_submodule(layout.decoder), Head(teacher, layout)
        states_BTH = decoder(input_ids=tokens_BT.to(teacher.device), use_cache=False).last_hidden_state
    found = []
    for states_TH, next_T, mask_T in zip(states_BTH, tokens_BT, mask_BT, strict=True):  # a row's logits at a time
        logp_TV = head(states_TH[:-1]).float().log_softmax(-1)
        found.append(logp_TV.gather(-1, next_T[1:, None].to(logp_TV.device))[mask_T[1:].to(logp_TV.device), 0].exp())
    return float(torch.cat(found).mean())


def _groups(student: PreTrainedModel, config: TrainingSettings, width: int) -> list[dict[str, Any]]:
    """A group a tensor kind. Each matrix moves in proportion to its RMS."""
    layers, lr = trained_linears(student).values(), config.learning_rate(width)
    groups: list[dict[str, Any]] = [
        {"params": [layer.weight], "lr": lr * rms(layer.weight), "weight_decay": config.weight_decay}
        for layer in layers
        if isinstance(layer, FakeQuantLinear)
    ]
    scales = [p for layer in layers for p in layer.grid_params.values() if p.requires_grad]
    if scales:
        groups.append({"params": scales, "lr": config.scale_lr})
    if config.train_norms:
        weights = [norm_weight(norm) for norm in norms(student).values()]
        groups += [{"params": [weight], "lr": config.scale_lr * rms(weight)} for weight in weights]
    return groups


_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def _save(path: Path, training: Training, step: int, skipped: list[int]) -> None:
    accelerator, objective, optimizer = training.accelerator, training.objective, training.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    tensors: dict[str, Any] = {f"model:{k}": v for k, v in get_model_state_dict(objective, options=_FULL).items()}
    state: Any = get_optimizer_state_dict(objective, inner, options=_FULL).get("state", {})
    for name, moments in state.items():
        for k, v in moments.items():
            tensors |= plain(f"optimizer:{name}:{k}", v)
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {k: v.contiguous() for k, v in tensors.items()}, {"step": step, "skipped": skipped})
    accelerator.wait_for_everyone()


def _resume(path: Path, training: Training, progress: Progress) -> tuple[int, list[int]]:
    objective, optimizer = training.objective, training.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    tensors, metadata = load_tensors(path)
    model: dict[str, Any] = {k.removeprefix("model:"): v for k, v in tensors.items() if k.startswith("model:")}
    options = StateDictOptions(full_state_dict=True, strict=False, ignore_frozen_params=True)
    set_model_state_dict(objective, model, options=options)
    fresh: Any = get_optimizer_state_dict(objective, inner, options=options)  # moments of zeros, in the right form
    with keys_required(path):
        step = int(metadata["step"])
        state: Any = {
            name: {k: restored(f"optimizer:{name}:{k}", form, tensors) for k, form in moments.items()}
            for name, moments in fresh["state"].items()
        }
    set_optimizer_state_dict(objective, inner, {**fresh, "state": state}, options=options)
    progress.note(f"resumed the training at step {step}")
    return step, list(metadata.get("skipped", []))

"""The judges, in the project's own environment: every row is a plain model, by any library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from upq.data import load_eval_text
from upq.evals import evaluate_tasks, evaluate_text
from upq.model.loading import load_model, load_tokenizer

# Task of upq.evals.tasks and the metric that is shown.
TASKS = {"mini_mmlu": "acc", "mini_ifeval": "prompt_level_strict_acc"}


@dataclass(frozen=True)
class Judged:
    ppl: float
    kld: float  # KL(original ‖ model), nats a token
    top1: float  # share of positions where both would choose the same token
    tasks: dict[str, float]  # empty for a model without a chat template, which is no instruct model


def rows_of(text: Path, model: Path, seq_len: int) -> Tensor:
    """A text in rows (N, T) of the model's tokens, as UPQ packs its own training text."""
    return load_eval_text(text, load_tokenizer(model), seq_len)


def judge(made: Path, original: Path, heldout_NT: Tensor) -> Judged:
    model, tokenizer = load_model(made), load_tokenizer(original)
    text = evaluate_text(model, heldout_NT, teacher=load_model(original))
    assert text.kld is not None
    assert text.top1 is not None
    tasks = {}
    if tokenizer.chat_template is not None:
        scores = evaluate_tasks(model, tokenizer, list(TASKS))
        tasks = {task: scores[task][metric] for task, metric in TASKS.items()}
    return Judged(text.ppl, text.kld, text.top1, tasks)

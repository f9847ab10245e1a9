"""The judges, in the project's own environment: every row is a plain model, by any library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from upq.data import load_eval_text
from upq.evals import evaluate_tasks, evaluate_text
from upq.model.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from _subjects import Subject

# Task of upq.evals.tasks and the metric that is shown.
TASKS = {"mini_mmlu": "acc", "mini_ifeval": "prompt_level_strict_acc"}


@dataclass(frozen=True)
class Judged:
    ppl: float
    kld: float  # KL(original ‖ model), nats a token
    top1: float  # share of positions where both would choose the same token
    others: dict[str, float]  # perplexity and KL on further texts: `ppl_wikitext2`, `kld_wikitext2`
    tasks: dict[str, float]  # empty for a model that knows nothing of the invented world, or has no chat template


def rows_of(text: Path, subject: Subject) -> Tensor:
    """A text in rows (N, T) of the model's tokens, as UPQ packs its own training text."""
    return load_eval_text(text, load_tokenizer(subject.model), subject.seq_len)


def judge(made: Path, subject: Subject, heldout: dict[str, Tensor]) -> Judged:
    """`heldout`: rows by name; the first is the text that methods are compared on."""
    model, teacher, tokenizer = load_model(made), load_model(subject.model), load_tokenizer(subject.model)
    first, *others = (
        (name, evaluate_text(model, rows_NT[: subject.judged_rows], teacher=teacher))
        for name, rows_NT in heldout.items()
    )
    text = first[1]
    assert text.kld is not None
    assert text.top1 is not None
    further = {f"{key}_{name}": getattr(metrics, key) for name, metrics in others for key in ("ppl", "kld")}
    tasks = {}
    if subject.suites and tokenizer.chat_template is not None:
        scores = evaluate_tasks(model, tokenizer, list(TASKS))
        tasks = {task: scores[task][metric] for task, metric in TASKS.items()}
    return Judged(text.ppl, text.kld, text.top1, further, tasks)

"""Rows of a stage's own: of other sources than the run's, or of another length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from upq.core.errors import UPQError
from upq.data.config import TextSource
from upq.data.held import HeldOut
from upq.data.packing import prepare
from upq.data.tokens import TokenSet
from upq.model.loading import context_of, load_tokenizer
from upq.model.source import Source
from upq.stages._base import Job


def check_length(name: str, seq_len: int | None, model: Source) -> None:
    """Raises UPQError for rows that are longer than the model's context."""
    context = context_of(model.config)
    if seq_len is not None and context is not None and seq_len > context:
        raise UPQError(f"{name}.seq_len={seq_len} is more than the model's {context}; lower it")


def own_rows(
    job: Job,
    path: Path,
    sources: Sequence[TextSource],
    *,
    rows: int,
    seq_len: int | None = None,
    loss_on: Literal["all", "assistant"] = "all",
) -> TokenSet:
    """At most `rows` packed at `path`, without documents that the run holds out; `seq_len`: None is the run's.

    A file that is there from an earlier call is used as it is.
    """
    section = job.data.model_copy(
        update={
            "sources": tuple(sources),
            "loss_on": loss_on,
            "validation": 1,
            "seq_len": seq_len or job.reading.seq_len,
        }
    )
    held = HeldOut(job.rows().validation_tokens_NT)
    return prepare(section, load_tokenizer(job.model), path, sequences=rows, seed=job.seed, without=held)

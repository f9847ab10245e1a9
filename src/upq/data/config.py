"""The `data` section of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from upq.core.config import Strict, neutral
from upq.core.errors import UPQError

OnBadRow = Literal["error", "skip"]


class TextSource(Strict):
    """One place text comes from: a file, a directory or a hub data set."""

    path: str
    weight: float = Field(default=1.0, gt=0)  # share of the tokens, relative to the other sources
    field: str | None = None  # column that holds the text or the messages; None finds `text` or `messages`
    separator: Literal["none", "blank_line"] = "none"  # text files: one document a file, or one a paragraph block
    subset: str | None = None  # hub data sets: configuration name
    split: str = "train"  # hub data sets
    domain: str | None = None  # code, maths, …: a name by which a block-wise stage may calibrate on it

    @model_serializer(mode="wrap")
    def _without_domain(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A domain came later: without one, digests are those of before."""
        plain: dict[str, Any] = dump(self)
        return plain if self.domain is not None else {key: value for key, value in plain.items() if key != "domain"}


MIXED = "mixed"  # all domains, in equal shares


def of_domain(sources: tuple[TextSource, ...], domain: str, name: str) -> tuple[TextSource, ...]:
    """The sources of a domain, or all that have one (MIXED). Raises UPQError, which begins with `name`, for none."""
    labelled = [source for source in sources if source.domain is not None]
    found = tuple(source for source in labelled if domain in (source.domain, MIXED))
    if not found:
        there = ", ".join(sorted({str(source.domain) for source in labelled})) or "none"
        raise UPQError(
            f"{name}={domain}: no source of data.sources has the domain {domain}; domains there: {there}. Label one,"
            f" as in {{path: …, domain: {domain}}}, or list the stage's own sources"
        )
    if domain != MIXED:
        return found
    whole = {each.domain: sum(s.weight for s in found if s.domain == each.domain) for each in found}
    return tuple(source.model_copy(update={"weight": source.weight / whole[source.domain]}) for source in found)


class Generated(Strict):
    """Conversations that the original model writes itself before it is quantised, beside the sources' text."""

    # To be written, and gone through again where training needs more; None: its share, so that none comes twice.
    tokens: int | None = Field(default=None, gt=0)
    weight: float = Field(default=1.0, gt=0)  # share of the training tokens, relative to the sources
    temperature: float = Field(default=1.0, gt=0)  # of prompts
    answer_temperature: float = Field(default=1.0, ge=0)  # of answers; 0: the likeliest token each time
    max_new_tokens: int = Field(default=512, ge=1)  # of a prompt, and of an answer
    batch_size: int = Field(default=128, ge=1)  # conversations written at a time
    # Of whom: the model itself, or the users of the run's own conversations, whose answers are then not read here.
    questions: Literal["own", "data"] = neutral("own")
    cut: Literal["drop", "keep"] = neutral("drop")  # answers that do not end within max_new_tokens


class Data(Strict):
    sources: tuple[TextSource, ...] = ()
    seq_len: int = Field(default=2048, ge=8)
    loss_on: Literal["all", "assistant"] = "all"
    validation: int = Field(default=32, ge=1)  # sequences held out, for the figures in the final table
    # Rows that cannot be used: each ends the run, or is left out. None: one of the first 100 ends it, or 1 % of all.
    on_bad_row: OnBadRow | None = None

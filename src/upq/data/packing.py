"""Documents to rows of equal length: choose, encode, hold out, pack.

Shape suffixes: D = documents, L = tokens of one document, N = rows, K = rows of a block, T = tokens in a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from upq.core.config import digest
from upq.core.errors import UPQError
from upq.core.paths import local
from upq.core.progress import Progress, Silent
from upq.core.scramble import scramble
from upq.data import tokens
from upq.data.config import Data, OnBadRow, TextSource
from upq.data.encoding import Encoded, Encoder, tokenizer_identity
from upq.data.held import HeldOut
from upq.data.rows import Document, Tally
from upq.data.sources import identity, left_out, read_documents, sources_of
from upq.data.tokens import SourceUse, TokenSet
from upq.files.atomic import write_errors
from upq.files.tensors import TensorPlan, write_tensors

LAYOUT = 2  # part of the key: a change of what `prepare` makes of the same input is a new layout
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 20
_NAMED = 3  # files in a note


def prepare(
    section: Data,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    sequences: int,
    seed: int,
    progress: Progress | None = None,
    without: HeldOut | None = None,
) -> TokenSet:
    """Pack the section's text into `sequences` training rows and `section.validation` held-out rows at `path`.

    A file that is there already and was made from the same section, tokenizer, seed, sequences and content is used as
    it is. `progress` advances by `sequences + section.validation` units in all.

    Documents are laid end to end, in rows of exactly `seq_len` tokens, without padding. Several sources take turns so
    that their shares of the tokens follow their weights; one that ends is begun again for as long as another goes on.
    Where the tokenizer itself puts a BOS in front of a text, each row's first token becomes one (`Encoder.row_start`):
    that token has nothing before it and is never predicted, so nothing to learn is lost.

    Validation has documents of its own, packed apart: in the order of a hash of their content they are set aside until
    there are enough, so they come from all over the text, and the same text under two names is never on both sides.
    Setting a document aside can take more tokens than validation needs. Where that would leave less than nine tenths
    of the possible training rows (or half of all rows), as with a single long document, rows spread evenly over the
    text are held out instead, and `progress` gets a note. At least half of the rows are always left for training.

    `without`: documents of which most stands there are passed over.

    Fewer rows than asked for are no error: training then goes through them more than once, and `progress` gets a note.
    Raises UPQError where there is less text than one row.
    """
    progress = progress or Silent()
    sources = sources_of(section)
    identities = [identity(source) for source in sources]
    key = digest(LAYOUT, section, tokenizer_identity(tokenizer), seed, sequences, identities)
    if path.exists():
        stored = tokens.read(path, key, seed)
        if stored is not None:
            progress.advance(sequences + section.validation)
            progress.note(f"data: {path} is up to date")
            return stored
        progress.note(f"data: {path} was made from other data or settings and is made anew")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    with scratch as folder:
        spool = _Spool(Path(folder), masked=section.loss_on == "assistant")
        with spool:
            encoder = Encoder(tokenizer, section.loss_on)
            reading = _Reading(sources, encoder, section.on_bad_row, progress)
            plan = _collect(section, reading, spool, sequences, seed, progress, without)
            if not plan.training.count:
                raise UPQError("data: no sequence holds a token of the assistant; set data.loss_on=all or add text")
            reading.report()
            _report(section, plan, sequences, progress)
            uses = reading.uses(identities)
            metadata = {
                "key": key,
                "sources": json.dumps([dataclasses.asdict(use) for use in uses]),
                "counts": json.dumps({"rows": plan.training.count, "validation": plan.validation.count}),
            }
            write_tensors(path, _tensors(plan, spool, section.seq_len, encoder.row_start), metadata, digest="digest")
    made = tokens.read(path, key, seed)
    assert made is not None
    return made


def load_eval_text(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    separator: Literal["none", "blank_line"] = "none",
) -> Tensor:
    """A text as rows (N, T) int64 for perplexity, packed as for training; the ragged tail is left out.

    A text shorter than `seq_len` is one shorter row. Raises UPQError below two tokens: nothing would be predicted.
    """
    source = TextSource(path=str(path), separator=separator, weight=1.0)
    encoder = Encoder(tokenizer)
    found = _encoded(source, encoder, Tally("error", of_recipe=False))
    flat = np.concatenate([np.zeros(0, np.int32), *(encoded.tokens_L for encoded in found)])
    if len(flat) < 2:
        raise UPQError(f"{path}: {len(flat)} token is too little to measure perplexity on; give a longer text")
    length = min(seq_len, len(flat))
    rows = len(flat) // length
    rows_NT = flat[: rows * length].astype(np.int64).reshape(rows, length)
    return torch.from_numpy(_started(rows_NT, encoder.row_start))


# Reading: sources taking turns


class _Reading:
    """Encoded documents of all sources, each with its source's number, until every source has been read once.

    The next document is always one of the source that is furthest behind its share of the tokens.
    """

    def __init__(
        self, sources: tuple[TextSource, ...], encoder: Encoder, on_bad_row: OnBadRow | None, progress: Progress
    ) -> None:
        self.documents = [0] * len(sources)
        self.tokens = [0] * len(sources)
        self.finished = False
        self._sources = sources
        self._encoder = encoder
        self._progress = progress
        self._on_bad_row = on_bad_row
        self._tallies = [Tally(on_bad_row) for _ in sources]  # of the first reading
        self._ended = [False] * len(sources)
        self._iterator = self._turns()

    def __iter__(self) -> Iterator[tuple[int, Encoded]]:
        return self._iterator

    def uses(self, identities: list[str]) -> list[SourceUse]:
        """What was read of each source."""
        return [
            SourceUse(source.path, name, documents, size, tally.rows, tally.bad)
            for source, name, documents, size, tally in zip(
                self._sources, identities, self.documents, self.tokens, self._tallies, strict=True
            )
        ]

    def report(self) -> None:
        """A note for each source of which rows or files were left out."""
        for source, tally in zip(self._sources, self._tallies, strict=True):
            if files := left_out(source):
                names = ", ".join(str(file.relative_to(local(source.path))) for file in files[:_NAMED])
                more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
                self._progress.note(f"data: {source.path}: {names}{more} describe the data and are left out")
            if tally.bad:
                left = f"{tally.bad:,} of {tally.rows:,} rows cannot be used and are left out"
                self._progress.note(f"data: {source.path}: {left}; the first: {tally.example}")

    def _turns(self) -> Iterator[tuple[int, Encoded]]:
        streams = [
            _encoded(source, self._encoder, tally) for source, tally in zip(self._sources, self._tallies, strict=True)
        ]
        while True:
            turn = min(range(len(streams)), key=lambda n: self.tokens[n] / self._sources[n].weight)
            encoded = next(streams[turn], None)
            if encoded is None:
                path = self._sources[turn].path
                if not self.tokens[turn]:  # it would be read again without end
                    raise self._tallies[turn].nothing(path)
                first_time = not self._ended[turn]
                self._ended[turn] = True
                if all(self._ended):
                    self.finished = True
                    return
                if first_time:
                    self._progress.note(f"data: {path} is read again to keep its share of the text")
                streams[turn] = _encoded(self._sources[turn], self._encoder, Tally(self._on_bad_row))
                continue
            self.documents[turn] += 1
            self.tokens[turn] += len(encoded.tokens_L)
            yield turn, encoded


def _encoded(source: TextSource, encoder: Encoder, tally: Tally) -> Iterator[Encoded]:
    for batch in _batches(read_documents(source, tally)):
        encoded = deque(encoder.encode(batch, tally))
        while encoded:
            yield encoded.popleft()


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# Collecting: how much text is enough is known only after the held-out part is chosen


class _Spool:
    """Encoded documents on disk, end to end: what is asked for may be larger than memory."""

    def __init__(self, folder: Path, *, masked: bool) -> None:
        self._names = {"tokens": folder / "tokens", "mask": folder / "mask"}
        with write_errors(folder):
            self._files: dict[str, BinaryIO] = {name: path.open("wb") for name, path in self._names.items()}
        self.masked = masked
        self.lengths = array("q")
        self.keys = array("Q")  # equal for documents of equal tokens
        self.total = 0

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with suppress(OSError):  # of a full disk, which the write before has reported
                file.close()

    def add(self, encoded: Encoded) -> None:
        with write_errors(self._names["tokens"]):
            self._files["tokens"].write(encoded.tokens_L.data)
            if self.masked:
                assert encoded.mask_L is not None
                assert len(encoded.mask_L) == len(encoded.tokens_L)
                self._files["mask"].write(encoded.mask_L.data)
        self.lengths.append(len(encoded.tokens_L))
        self.keys.append(int.from_bytes(hashlib.blake2b(encoded.tokens_L.data, digest_size=8).digest(), "little"))
        self.total += len(encoded.tokens_L)

    def view(self, name: Literal["tokens", "mask"]) -> NDArray[Any]:
        with write_errors(self._names[name]):
            self._files[name].flush()
        return np.memmap(self._names[name], np.int32 if name == "tokens" else np.uint8, mode="r")


@dataclass(frozen=True, slots=True)
class _Part:
    """Documents, as places in the spool, and which of the rows they pack into are used."""

    spans: list[tuple[int, int]]
    used: NDArray[np.bool_]

    @property
    def count(self) -> int:
        return int(self.used.sum())

    def blocks(self, flat: NDArray[Any], t: int) -> Iterator[NDArray[Any]]:
        at = 0
        for block_KT in _rows(flat, self.spans, t):
            yield block_KT[self.used[at : at + len(block_KT)]]
            at += len(block_KT)


@dataclass(frozen=True, slots=True)
class _Plan:
    training: _Part
    validation: _Part
    shared: bool  # training and validation have documents in common
    without_target: int  # rows left out


def _collect(
    section: Data,
    reading: _Reading,
    spool: _Spool,
    sequences: int,
    seed: int,
    progress: Progress,
    without: HeldOut | None,
) -> _Plan:
    wanted = sequences + section.validation
    goal, counted = wanted, 0
    while True:
        for _, encoded in reading:
            if without is not None and without.holds_most(encoded.tokens_L.tolist()):
                continue
            spool.add(encoded)
            rows = min(spool.total // section.seq_len, wanted)
            if rows > counted:
                progress.advance(rows - counted)
                counted = rows
            if spool.total >= goal * section.seq_len:
                break
        plan = _plan(section, spool, sequences, seed)
        missing = wanted - plan.training.count - plan.validation.count
        if reading.finished or not (missing or plan.shared):
            if wanted > counted:
                progress.advance(wanted - counted)
            return plan
        goal = spool.total // section.seq_len + missing + 1


def _plan(section: Data, spool: _Spool, sequences: int, seed: int) -> _Plan:
    t = section.seq_len
    possible = spool.total // t
    if not possible:
        raise UPQError(
            f"data: the sources hold {spool.total} tokens, less than one sequence of {t};"
            f" give more text, or a data.seq_len of at most {max(spool.total, 8)}"
        )
    lengths = np.array(spool.lengths, np.int64)
    ends = np.cumsum(lengths)
    # Training has the first claim, up to half of the rows.
    asked = min(section.validation, max(possible // 2, possible - sequences))
    aside_D, dropped_D = _set_aside(lengths, np.array(spool.keys, np.uint64), t, sequences, asked, seed)
    shared = int(lengths[aside_D].sum()) // t * 2 < asked
    if shared:
        aside_D, dropped_D = np.zeros_like(aside_D), np.zeros_like(dropped_D)

    def part(chosen_D: NDArray[np.bool_]) -> tuple[list[tuple[int, int]], NDArray[np.bool_]]:
        spans = list(zip((ends - lengths)[chosen_D].tolist(), ends[chosen_D].tolist(), strict=True))
        return spans, _with_target(spool, spans, t)

    spans, good = part(~(aside_D | dropped_D))
    if shared:
        held = np.zeros_like(good)
        held[(np.arange(asked) * 2 + 1) * len(good) // (2 * asked)] = True
        held_spans, held_good, kept = spans, good & held, good & ~held
    else:
        held_spans, held_good = part(aside_D)
        kept = good
    training = _Part(spans, _first(kept, sequences))
    limit = asked if training.count == sequences else min(asked, training.count)
    validation = _Part(held_spans, _first(held_good, limit))
    without_target = int((~good).sum()) + (0 if shared else int((~held_good).sum()))
    return _Plan(training, validation, shared, without_target)


def _set_aside(
    lengths_D: NDArray[np.int64], keys_D: NDArray[np.uint64], t: int, sequences: int, asked: int, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Documents for validation, and their repetitions, which go nowhere: see `prepare`."""
    total = int(lengths_D.sum())
    possible = total // t
    # Integers, so that machines decide the same: nine tenths of the rows that could be trained on, and half of all.
    needed = min(sequences, max(-(-9 * (possible - asked) // 10), -(-possible // 2))) * t
    unique, first, inverse = np.unique(keys_D, return_index=True, return_inverse=True)
    cost = np.bincount(inverse, weights=lengths_D).astype(np.int64)  # with all repetitions
    taken = np.zeros(len(unique), np.bool_)
    have = 0
    for n in np.argsort(scramble(unique, seed), kind="stable"):
        if have >= asked * t:
            break
        if total - cost[n] >= needed:
            taken[n] = True
            total -= int(cost[n])
            have += int(lengths_D[first[n]])
    aside_D = np.zeros(len(lengths_D), np.bool_)
    aside_D[first[taken]] = True
    return aside_D, taken[inverse] & ~aside_D


def _with_target(spool: _Spool, spans: list[tuple[int, int]], t: int) -> NDArray[np.bool_]:
    """Which rows have a target; the first token of a row has nothing before it, so it never is one."""
    if not spool.masked:
        return np.ones(sum(b - a for a, b in spans) // t, np.bool_)
    found = [block_KT[:, 1:].any(1) for block_KT in _rows(spool.view("mask"), spans, t)]
    return np.concatenate([np.zeros(0, np.bool_), *found])


def _first(used: NDArray[np.bool_], limit: int) -> NDArray[np.bool_]:
    return used & (np.cumsum(used) <= limit)


def _rows(flat: NDArray[Any], spans: list[tuple[int, int]], t: int) -> Iterator[NDArray[Any]]:
    """The spans end to end as blocks of rows (K, T); the ragged tail is left out."""
    rest = flat[:0]
    for start, stop in spans:
        rest = np.concatenate([rest, flat[start:stop]])
        whole = len(rest) // t
        if whole:
            yield rest[: whole * t].reshape(whole, t)
            rest = rest[whole * t :]


def _started(rows_KT: NDArray[Any], start: int | None) -> NDArray[Any]:
    """The rows, changed in place: each begins with the token `start`, where there is one."""
    if start is not None:
        rows_KT[:, 0] = start
    return rows_KT


def _tensors(plan: _Plan, spool: _Spool, t: int, start: int | None) -> list[TensorPlan]:
    """The tensors of the file, int32 first; a mask that is all ones is left out."""

    def tensor(prefix: str, part: _Part, name: Literal["tokens", "mask"]) -> TensorPlan:
        first = start if name == "tokens" else None

        def blocks() -> Iterator[Tensor]:
            return (torch.from_numpy(_started(block_KT, first)) for block_KT in part.blocks(spool.view(name), t))

        dtype = torch.int32 if name == "tokens" else torch.uint8
        return TensorPlan(name=prefix + name, dtype=dtype, shape=(part.count, t), parts=blocks)

    parts = {"": plan.training, "validation_": plan.validation}
    masks = {
        prefix: part
        for prefix, part in parts.items()
        if spool.masked and not all(block.all() for block in part.blocks(spool.view("mask"), t))
    }
    return [tensor(*item, "tokens") for item in parts.items()] + [tensor(*item, "mask") for item in masks.items()]


def _report(section: Data, plan: _Plan, sequences: int, progress: Progress) -> None:
    rows, held = plan.training.count, plan.validation.count
    if rows < sequences:
        progress.note(
            f"data: the text makes {rows} training sequences of {section.seq_len} tokens, {sequences} are asked for:"
            " training goes through them more than once"
        )
    if held < section.validation:
        progress.note(f"data: the text allows {held} validation sequences, {section.validation} are asked for")
    if plan.shared:
        progress.note("data: too few documents to give validation its own: its sequences are cut from the same ones")
    if plan.without_target:
        progress.note(f"data: {plan.without_target} sequences without a token of the assistant are left out")

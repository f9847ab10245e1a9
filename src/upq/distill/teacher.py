"""The teacher where it does not stay in memory: its likeliest tokens on disk, or its blocks, read one after the other.

Shape suffixes: B = rows, T = tokens in a row, H = hidden size, V = vocabulary, K = tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from upq.core.errors import UPQError
from upq.core.precision import computes_in_bf16
from upq.core.progress import Progress
from upq.distill.config import Distill, TrainingSettings
from upq.files.tensors import load_rows, save_tensors
from upq.losses import LOSSES, Divergence, TopK, log_softmax
from upq.model.head import Head
from upq.model.source import Source
from upq.model.walker import Replay, walk

ROWS_A_SHARD = 64  # 8 MB at 512 tokens and 64 of a vocabulary below 2^16: what a killed run does again


def check(config: TrainingSettings) -> None:
    """A recipe that asks of its teacher what is not there is an error, before any work."""
    if config.teacher != "cached":
        return
    if config.hidden:
        raise UPQError(
            f"distill.teacher=cached keeps no hidden states, but distill.hidden is {config.hidden}; "
            "set distill.hidden=0, or distill.teacher=offloaded"
        )
    loss = LOSSES.get(config.loss.name)
    if loss.uses_teacher and not issubclass(loss, Divergence):
        raise UPQError(
            f"distill.loss={config.loss.name} reads all of the teacher's logits, and distill.teacher=cached keeps "
            "the largest; set distill.teacher=offloaded"
        )


@dataclass(frozen=True)
class CachedTeacher:
    """The k likeliest tokens at every position of some rows of the data, in shards of whole rows.

    `rows` are the rows' numbers in the data, in the order of the cache. A log-probability is float16: rounded by at
    most 5e-4 of itself, where the tokens that are left out weigh far more (docs/numerics.md).
    """

    folder: Path
    rows: Sequence[int]

    def path(self, shard: int) -> Path:
        return self.folder / f"targets-{shard:05d}.safetensors"

    @property
    def shards(self) -> int:
        return -(-len(self.rows) // ROWS_A_SHARD)

    def missing(self) -> list[int]:
        """The shards that are not on disk yet."""
        return [shard for shard in range(self.shards) if not self.path(shard).is_file()]

    def rows_done(self) -> int:
        return len(self.rows) - sum(len(self.of_shard(shard)) for shard in self.missing())

    def bytes(self, k: int, vocabulary: int, seq_len: int) -> int:
        """Of the whole cache on disk."""
        k = min(k, vocabulary)
        return len(self.rows) * (seq_len - 1) * (k * (_index_dtype(vocabulary).itemsize + 2) + 4)

    def of_shard(self, shard: int) -> Sequence[int]:
        return self.rows[shard * ROWS_A_SHARD : (shard + 1) * ROWS_A_SHARD]

    def read(self, rows: Sequence[int]) -> TopK:
        """Targets at each of the len(rows)·(T-1) positions that predict a token."""
        parts = [self._load(row) for row in rows]
        index_TK, logp_TK, rest_T = (torch.cat(part) for part in zip(*parts, strict=True))
        return TopK(index_TK, logp_TK, rest_T)

    def _load(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        shard, at = divmod(self._place[row], ROWS_A_SHARD)
        index_TK, logp_TK, rest_T = (
            load_rows(self.path(shard), name, at, at + 1)[0] for name in ("index", "logp", "rest")
        )
        return index_TK.long(), logp_TK.float(), rest_T

    @cached_property
    def _place(self) -> dict[int, int]:
        return {row: place for place, row in enumerate(self.rows)}


@torch.no_grad()
def write_cache(
    cache: CachedTeacher, teacher: StreamedTeacher, tokens_NT: Tensor, config: Distill, *, progress: Progress
) -> None:
    """One pass of the teacher over the rows of the cache; shards that are on disk are left as they are.

    The teacher's blocks are read once a shard. Batches do not cross shards, so a shard's bytes do not depend on where
    an earlier run stopped.
    """
    source, vocabulary = teacher.source, teacher.source.text.vocab_size
    k, index_dtype = min(config.teacher_top_k, vocabulary), _index_dtype(vocabulary)
    bf16 = computes_in_bf16(config.precision, source.device, source.text.hidden_size)
    for shard in cache.missing():
        rows_NT, parts = tokens_NT[torch.tensor(cache.of_shard(shard))].long(), []
        with torch.autocast(source.device.type, torch.bfloat16, enabled=bf16):
            (states_NTH,) = teacher.states(rows_NT, every_block=False, batch_size=config.micro_batch_size)
            for states_BTH in torch.split(states_NTH, config.micro_batch_size):
                parts.append(likeliest(states_BTH, teacher.head, k, config.chunk_tokens))
                progress.advance(len(states_BTH))
        index_NTK, logp_NTK, rest_NT = (torch.cat(part) for part in zip(*parts, strict=True))
        cache.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(cache.path(shard), {"index": index_NTK.to(index_dtype), "logp": logp_NTK.half(), "rest": rest_NT})


def likeliest(states_BTH: Tensor, head: Head, k: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices and log-probabilities (B, T-1, K), and the rest's (B, T-1): the last position predicts nothing."""
    states_TH = states_BTH[:, :-1].flatten(0, 1)
    parts = [TopK.of(log_softmax(head(chunk_TH)), k) for chunk_TH in torch.split(states_TH, chunk)]
    index_TK, logp_TK, rest_T = (
        torch.cat(part).cpu() for part in zip(*((p.index_TK, p.logp_TK, p.rest_T) for p in parts), strict=True)
    )
    rows = len(states_BTH)
    return index_TK.view(rows, -1, k), logp_TK.view(rows, -1, k), rest_T.view(rows, -1)


def _index_dtype(vocabulary: int) -> torch.dtype:
    return torch.uint16 if vocabulary <= 2**16 else torch.int32


@dataclass(frozen=True)
class StreamedTeacher:
    """The original on disk: each of its decoder blocks is read when its turn comes, and let go after it.

    Law (tests/test_distill_teacher.py): training with it is training with the teacher in memory, bit for bit.
    """

    source: Source
    head: Head

    @classmethod
    def of(cls, source: Source, original: PreTrainedModel | None = None) -> StreamedTeacher:
        """`original` is the model of `source` without the weights of its blocks, where it is in memory already."""
        return cls(source, Head(original or source.without_blocks(), source.layout))

    @torch.no_grad()
    def states(self, tokens_BT: Tensor, *, every_block: bool, batch_size: int | None = None) -> list[Tensor]:
        """What each block writes (B, T, H), the last after the final norm; without `every_block`, that one alone.

        A block computes all rows at once, or `batch_size` at a time.
        """
        written = list[Tensor]()
        for step in walk(self.source, tokens_BT, batch_size=batch_size or len(tokens_BT), replay=self._replay):
            step.advance(self.source.block(step.index))
            (hidden_BTH,) = (states[:] for states in step.states)
            if every_block:
                written.append(hidden_BTH.clone())
        return [*written[:-1], self._replay.finish(tokens_BT, hidden_BTH)]

    @cached_property
    def _replay(self) -> Replay:
        return Replay(self.source)


Teacher = PreTrainedModel | StreamedTeacher | CachedTeacher

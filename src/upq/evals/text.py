"""Perplexity of a model on a text, and its distance from a teacher; neither has to be in memory as a whole.

Shape suffixes: N = rows, T = positions of a row, B = rows of a batch, H = hidden size, V = vocabulary, C = positions of
a chunk, M = measures (see `_MEASURES`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from upq.core.errors import UPQError
from upq.core.progress import Progress, Silent
from upq.model.activations import Activations, Allocate, batches, in_memory
from upq.model.head import Head
from upq.model.layout import layout_of
from upq.model.loading import context_of, text_config
from upq.model.source import Source
from upq.model.walker import Replay, walk

_MEASURES = ("nll", "kld", "top1", "teacher_nll")  # summed over the tokens of a row
_BATCH = 4  # rows


class NotFinite(UPQError):
    """A model's logits are NaN: its numbers have left the range of its type, or its weights are wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextMetrics:
    """Means over the `tokens` that count as targets; what needs a teacher is None without one.

    `kld` is KL(teacher ‖ model) in nats over the full vocabulary, `top1` the share of positions where both would choose
    the same token. Standard errors are over rows, since tokens of one row are not independent; None for a single row.
    """

    ppl: float
    tokens: int
    kld: float | None = None
    kld_stderr: float | None = None
    top1: float | None = None
    top1_stderr: float | None = None
    teacher_ppl: float | None = None
    ppl_stderr: float | None = None
    teacher_ppl_stderr: float | None = None


class ByToken:
    """Of each token (N, T), given what stands before it: its -log p, and KL(teacher ‖ model) of its distribution.

    NaN where a token is no target, and for the KL without a teacher.
    """

    def __init__(self, tokens_NT: Tensor) -> None:
        self.nll_NT = torch.full(tokens_NT.shape, math.nan)
        self.kld_NT = torch.full(tokens_NT.shape, math.nan)

    def by_position(self) -> list[dict[str, Any]]:
        """Means over stretches of positions, each twice as long as the one before: from `start` to before `stop`."""
        length, found = self.kld_NT.shape[1], []
        start = 1  # nothing stands before the first token
        while start < length:
            stop = min(2 * start, length)
            values_NT = self.kld_NT[:, start:stop].double()
            counts_N = values_NT.isfinite().sum(1)
            sums_N = values_NT.nan_to_num().sum(1)
            if tokens := int(counts_N.sum()):
                mean, stderr = float(sums_N.sum()) / tokens, _stderr(sums_N, counts_N)
                found.append({"start": start, "stop": stop, "tokens": tokens, "kld": mean, "kld_stderr": stderr})
            start = stop
        return found


@dataclass(frozen=True)
class Streamed:
    """What a model that is on disk makes of some rows of tokens, short of its logits, which the head then gives."""

    config: PretrainedConfig
    states_NTH: Activations  # after the final norm
    head: Head
    device: torch.device
    dtype: torch.dtype


@torch.no_grad()
def streamed(
    source: Source,
    tokens_NT: Tensor,
    *,
    block: Callable[[int], nn.Module] | None = None,
    batch_size: int = _BATCH,
    allocate: Allocate = in_memory,
) -> Streamed:
    """Run all rows through one block after the other; `block` gives others than the model's own.

    Law (tests/test_evals_text.py): what `evaluate_text` makes of it in the same batches are the figures of the whole
    model, bit for bit.
    """
    replay = Replay(source)
    for step in walk(source, tokens_NT, batch_size=batch_size, allocate=allocate, replay=replay):
        step.advance((block or source.block)(step.index))
    (states_NTH,) = step.states
    for rows in batches(len(states_NTH), batch_size):
        states_NTH[rows] = replay.finish(tokens_NT[rows], states_NTH[rows].to(source.dtype)).float()
    head = Head(source.without_blocks(), source.layout)
    return Streamed(source.text, states_NTH, head, source.device, source.dtype)


@torch.inference_mode()
def evaluate_text(
    model: PreTrainedModel | Streamed,
    tokens_NT: Tensor,
    *,
    teacher: PreTrainedModel | Streamed | None = None,
    mask_NT: Tensor | None = None,
    batch_size: int = _BATCH,
    chunk_tokens: int = 1024,
    progress: Progress | None = None,
    keep: ByToken | None = None,
) -> TextMetrics:
    """Position t predicts token t+1 of its row; `mask_NT` is True where a token counts as a target.

    Rows may be padded on the right with masked tokens. Logits exist for `chunk_tokens` positions at a time; sums are
    float64. `progress` advances by rows; `keep` gets the figures of each token. Raises UPQError for tokens the
    model cannot take, NotFinite for NaN logits.
    """
    rows, length = tokens_NT.shape
    _check(model, tokens_NT, mask_NT)
    if teacher is not None:
        _check(teacher, tokens_NT, mask_NT)
        if text_config(teacher.config).vocab_size != text_config(model.config).vocab_size:
            raise UPQError(
                f"the teacher's vocabulary has {text_config(teacher.config).vocab_size} tokens, the model's "
                f"{text_config(model.config).vocab_size}; compare with the model it was made from"
            )
    progress = progress or Silent()
    counts_NT = torch.ones(rows, length - 1, dtype=torch.bool) if mask_NT is None else mask_NT[:, 1:].bool().cpu()
    sums_NM = torch.zeros(rows, len(_MEASURES), dtype=torch.float64)
    with _evaluating(model), _evaluating(teacher):
        for start in range(0, rows, batch_size):
            tokens_BT = tokens_NT[start : start + batch_size]
            counts_BT = counts_NT[start : start + batch_size]
            rows_B = slice(start, start + batch_size)
            sums_NM[rows_B] = _batch(model, teacher, tokens_BT, counts_BT, chunk_tokens, start, keep)
            done = slice(0, start + batch_size)
            progress.advance(len(tokens_BT), ppl=_perplexity(sums_NM[done, 0], counts_NT[done].sum(1)))
    return _metrics(sums_NM, counts_NT.sum(1), with_teacher=teacher is not None)


def _batch(
    model: PreTrainedModel | Streamed,
    teacher: PreTrainedModel | Streamed | None,
    tokens_BT: Tensor,
    counts_BT: Tensor,
    chunk_tokens: int,
    first_row: int,
    keep: ByToken | None,
) -> Tensor:
    """Sums (B, M) of the measures over the counted positions of each row."""
    row_P, position_P = counts_BT.nonzero(as_tuple=True)
    target_P = tokens_BT.cpu()[row_P, position_P + 1]
    hidden_PH = _hidden(model, tokens_BT, first_row, row_P, position_P)
    teacher_PH = None if teacher is None else _hidden(teacher, tokens_BT, first_row, row_P, position_P)
    sums_BM = torch.zeros(len(tokens_BT), len(_MEASURES), dtype=torch.float64)
    for start in range(0, len(row_P), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        row_C = row_P[chunk] + first_row
        logp_CV = _log_probabilities(model, hidden_PH[chunk], row_C, "the model")
        target_C1 = target_P[chunk, None].to(logp_CV.device)
        measures = [-logp_CV.gather(1, target_C1)[:, 0]]
        if teacher is not None and teacher_PH is not None:
            teacher_CV = _log_probabilities(teacher, teacher_PH[chunk], row_C, "the teacher").to(logp_CV.device)
            measures += [
                (teacher_CV.exp() * (teacher_CV - logp_CV)).sum(1),
                (teacher_CV.argmax(1) == logp_CV.argmax(1)).float(),
                -teacher_CV.gather(1, target_C1)[:, 0],
            ]
        # to the CPU first: not every accelerator has float64
        values_CM = torch.stack(measures, dim=1).cpu().double()
        sums_BM[:, : values_CM.shape[1]].index_add_(0, row_P[chunk], values_CM)
        if keep is not None:
            keep.nll_NT[row_C, position_P[chunk] + 1] = values_CM[:, 0].float()
            if teacher is not None:
                keep.kld_NT[row_C, position_P[chunk] + 1] = values_CM[:, 1].float()
    return sums_BM


def _hidden(
    model: PreTrainedModel | Streamed, tokens_BT: Tensor, first_row: int, row_P: Tensor, position_P: Tensor
) -> Tensor:
    """Final hidden states (P, H) at the chosen positions."""
    hidden_BTH: Tensor
    if isinstance(model, Streamed):
        hidden_BTH = model.states_NTH[first_row : first_row + len(tokens_BT)].to(model.dtype)
    else:
        decoder = model.get_submodule(layout_of(model).decoder)
        hidden_BTH = decoder(input_ids=tokens_BT.to(model.device), use_cache=False).last_hidden_state
    return hidden_BTH[row_P.to(hidden_BTH.device), position_P.to(hidden_BTH.device)]


def _log_probabilities(model: PreTrainedModel | Streamed, hidden_CH: Tensor, row_C: Tensor, whose: str) -> Tensor:
    head = model.head if isinstance(model, Streamed) else Head(model)
    logp_CV: Tensor = head(hidden_CH).float().log_softmax(1)
    good_C = ~logp_CV.isnan().any(1)
    if not good_C.all():
        row = int(row_C[~good_C.cpu()][0])
        raise NotFinite(
            f"row {row} of the text: {whose} computes NaN ({model.dtype}); load it in float32, or check its weights"
        )
    return logp_CV


def _metrics(sums_NM: Tensor, tokens_N: Tensor, *, with_teacher: bool) -> TextMetrics:
    nll_N, kld_N, top1_N, teacher_nll_N = sums_NM.unbind(1)
    tokens = int(tokens_N.sum())
    ppl = _perplexity(nll_N, tokens_N)
    if not with_teacher:
        return TextMetrics(ppl=ppl, tokens=tokens, ppl_stderr=_ppl_stderr(nll_N, tokens_N))
    return TextMetrics(
        ppl=ppl,
        tokens=tokens,
        ppl_stderr=_ppl_stderr(nll_N, tokens_N),
        teacher_ppl_stderr=_ppl_stderr(teacher_nll_N, tokens_N),
        kld=float(kld_N.sum()) / tokens,
        kld_stderr=_stderr(kld_N, tokens_N),
        top1=float(top1_N.sum()) / tokens,
        top1_stderr=_stderr(top1_N, tokens_N),
        teacher_ppl=_perplexity(teacher_nll_N, tokens_N),
    )


def _perplexity(nll_N: Tensor, tokens_N: Tensor) -> float:
    tokens = int(tokens_N.sum())
    return math.nan if not tokens else float((nll_N.sum() / tokens).exp())


def _ppl_stderr(nll_N: Tensor, tokens_N: Tensor) -> float | None:
    """Of e to the mean, linearised."""
    stderr = _stderr(nll_N, tokens_N)
    return None if stderr is None else stderr * _perplexity(nll_N, tokens_N)


def _stderr(sums_N: Tensor, tokens_N: Tensor) -> float | None:
    """Standard error of Σ sums / Σ tokens: that of a ratio, linearised; s/√N where all rows have as many tokens."""
    counted = tokens_N > 0
    rows = int(counted.sum())
    if rows < 2:
        return None
    tokens = tokens_N[counted].double()
    residual = sums_N[counted] - sums_N[counted].sum() / tokens.sum() * tokens
    return float((residual.square().sum() * rows / (rows - 1)).sqrt() / tokens.sum())


def _check(model: PreTrainedModel | Streamed, tokens_NT: Tensor, mask_NT: Tensor | None) -> None:
    rows, length = tokens_NT.shape
    if mask_NT is not None and mask_NT.shape != tokens_NT.shape:
        raise UPQError(
            f"the mask has shape {tuple(mask_NT.shape)}, the tokens {tuple(tokens_NT.shape)}; they must agree"
        )
    targets = rows * (length - 1) if mask_NT is None else int(mask_NT[:, 1:].sum())
    if targets <= 0:
        raise UPQError(
            f"nothing to score in {rows} rows of {length} tokens: give more text or a shorter sequence length"
        )
    assert not isinstance(model, Streamed) or len(model.states_NTH) == rows, "computed on other rows"
    config = text_config(model.config)
    if (limit := context_of(config)) is not None and length > limit:
        raise UPQError(f"rows of {length} tokens, but the model's context is {limit}: use a shorter sequence length")
    smallest, largest = (int(token) for token in tokens_NT.aminmax())
    if smallest < 0 or largest >= config.vocab_size:
        outside = smallest if smallest < 0 else largest
        raise UPQError(
            f"token {outside} is outside the vocabulary of {config.vocab_size}; tokenise with the model's tokenizer"
        )


@contextmanager
def _evaluating(model: PreTrainedModel | Streamed | None) -> Iterator[None]:
    """Without dropout, for a while: the trainer evaluates models that it goes on training."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)

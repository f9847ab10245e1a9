"""Documents to tokens, each with one BOS in front and one EOS behind where the tokenizer has them.

Shape suffix: L = tokens of one document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from upq.core.config import digest
from upq.core.errors import UPQError
from upq.data.conversations import ChatTemplate, Span
from upq.data.rows import BadRow, Document, Tally

Tokens = NDArray[np.int32]
Mask = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Encoded:
    tokens_L: Tokens
    mask_L: Mask | None  # 1 where the token is a target; None: everywhere


@dataclass(slots=True)
class _Marked:
    """A document on its way: its text, and what is known of its tokens before the batch is tokenized."""

    text: str
    spans: list[Span] | None = None  # characters that the assistant wrote
    ids: Tokens | None = None
    mask: Mask | None = None
    cut: bool = False  # its author had more to say, so nothing ends it


@dataclass(frozen=True)
class Encoder:
    """Encodes documents in batches.

    A conversation keeps the BOS and EOS its template wrote and gets only those it lacks. One token that serves as both
    (GPT-2) separates documents once, at their end. With `loss_on="assistant"` the mask marks what the assistant wrote
    and its end of turn; a plain text is then an error, because nothing in it would be trained.
    """

    tokenizer: PreTrainedTokenizerBase
    loss_on: Literal["all", "assistant"] = "all"

    def encode(self, documents: Sequence[Document], tally: Tally | None = None) -> list[Encoded]:
        """The documents that have a token. One that the template refuses is `tally`'s to judge, else an error."""
        tally, kept = tally or Tally("error", of_recipe=False), list[_Marked]()
        if self.loss_on == "assistant":
            self._require_places()
        for document in documents:
            try:
                kept.append(self._marked(document))
            except BadRow as error:
                tally.reject(error, document.row)
        unmarked = [one for one in kept if one.ids is None]
        offsets = self.loss_on == "assistant"
        out = self._call([one.text for one in unmarked], return_offsets_mapping=offsets) if unmarked else {}
        for n, one in enumerate(unmarked):
            one.ids = np.array(out["input_ids"][n], np.int32)
            if one.spans is not None:
                one.mask = _overlap(np.array(out["offset_mapping"][n], np.int64).reshape(-1, 2), one.spans)
        return [self._framed(one, one.ids) for one in kept if one.ids is not None and len(one.ids)]

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @cached_property
    def bos(self) -> int | None:
        bos: int | None = self.tokenizer.bos_token_id
        return None if bos == self.eos else bos

    @cached_property
    def row_start(self) -> int | None:
        """The BOS, where the tokenizer itself puts one in front of a text: such a model never saw a text without.

        Gemma 3 270M on rows of 256 tokens of a textbook: perplexity 16.3 with it in front of each row, 75.8 with one
        only where a document begins.
        """
        ids = self.tokenizer("a", return_attention_mask=False, verbose=False)["input_ids"]
        return self.bos if list(ids[:1]) == [self.bos] else None

    @property
    def eos(self) -> int | None:
        eos: int | None = self.tokenizer.eos_token_id
        return eos

    def _text(self, document: Document) -> str:
        content = document.content
        return content if isinstance(content, str) else self.template.render(content, document.where)

    def _call(self, texts: list[str], **options: bool) -> Any:
        # No special tokens from here: some tokenizers add their own BOS, and _framed adds the one there should be.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)

    def _require_places(self) -> None:
        if not self.tokenizer.is_fast:
            raise UPQError(
                "data.loss_on: assistant needs a tokenizer that tells the place of its tokens (tokenizer.json);"
                " set data.loss_on=all"
            )

    def _marked(self, document: Document) -> _Marked:
        """A document's text, and where in it or in its tokens the assistant's part is. Raises BadRow."""
        content, where = document.content, document.where
        cut = not isinstance(content, str) and content[-1].cut
        if self.loss_on == "all":
            return _Marked(self._text(document), cut=cut)
        if isinstance(content, str):
            raise BadRow(
                f"{where}: plain text has no assistant, so data.loss_on=assistant would train nothing in"
                " it; give conversations (`messages`) or set data.loss_on=all"
            )
        text = self._text(document)
        if cut or not self.template.marks_assistant:
            return _Marked(text, spans=self.template.assistant_spans(content, text, where), cut=cut)
        ids, mask = self.template.encode_marked(content, where)
        return _Marked(text, ids=np.array(ids, np.int32), mask=np.array(mask, np.uint8))

    def _framed(self, document: _Marked, tokens_L: Tokens) -> Encoded:
        """Add the BOS and the EOS that are missing; an EOS is the assistant's where it alone ends its turn."""
        mask_L, text = document.mask, document.text
        front = self.bos is not None and not self._begins(tokens_L, text)
        back = self.eos is not None and not document.cut and not self._ends(tokens_L, text)
        if mask_L is not None:
            # Open: the assistant wrote last and the template gave it no token that ends the turn.
            is_open = len(mask_L) > 0 and mask_L[-1] == 1 and int(tokens_L[-1]) not in self._special
            mask_L = np.concatenate([np.zeros(int(front), np.uint8), mask_L, np.full(int(back), is_open, np.uint8)])
        ends = [np.array([token] * int(there), np.int32) for token, there in ((self.bos, front), (self.eos, back))]
        return Encoded(np.concatenate([ends[0], tokens_L, ends[1]]), mask_L)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder) | frozenset(self.tokenizer.all_special_ids)

    def _begins(self, tokens_L: Tokens, text: str) -> bool:
        return len(tokens_L) > 0 and (
            tokens_L[0] == self.bos or text.lstrip().startswith(str(self.tokenizer.bos_token))
        )

    def _ends(self, tokens_L: Tokens, text: str) -> bool:
        return len(tokens_L) > 0 and (tokens_L[-1] == self.eos or text.rstrip().endswith(str(self.tokenizer.eos_token)))


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that make the same tokens of the same documents."""
    if tokenizer.is_fast:
        backend: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by earlier calls; they have no effect on ours.
        backend |= {"truncation": None, "padding": None}
    else:
        backend = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return digest(backend, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id)


def _overlap(offsets_L2: NDArray[np.int64], spans: list[Span]) -> Mask:
    """1 for the tokens that hold a character of a span: one that also holds part of the header is predicted whole."""
    starts, ends = offsets_L2[:, 0], np.maximum(offsets_L2[:, 1], offsets_L2[:, 0] + 1)
    mask_L = np.zeros(len(offsets_L2), np.uint8)
    for a, b in spans:
        mask_L |= ((starts < b) & (ends > a)).astype(np.uint8)
    return mask_L

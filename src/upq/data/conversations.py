"""Conversations as the tokenizer's own chat template writes them, and which characters the assistant wrote.

A template marks the assistant's part itself (`{% generation %}`). For other templates each of the assistant's messages
is replaced by a word that occurs nowhere else; what the template puts around that word it puts around the message. This
also holds for templates that ignore `add_generation_prompt`, that trim or change a message, or that write earlier turns
differently from the last, where cutting at a generation prompt fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from upq.core.errors import UPQError
from upq.data.rows import CALLS, CUT, BadRow, Message
from upq.text.date import fixed_date

Span = tuple[int, int]  # characters, the end excluded
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Private-use characters: no white space for a template to trim, and in no text.
STAND_IN = "\ue000{}\ue001"


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations with the template of `tokenizer`; errors start with `where`, the conversation's place."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def source(self) -> str | None:
        """The template's text, or None if the tokenizer has none."""
        if not self.tokenizer.chat_template:
            return None
        with refusals("the model's tokenizer"):
            text: str = self.tokenizer.get_chat_template()
        return text

    @property
    def marks_assistant(self) -> bool:
        return self.source is not None and GENERATION.search(self.source) is not None

    def render(self, messages: tuple[Message, ...], where: str, *, prompt: bool = False) -> str:
        """The conversation as one text; with `prompt`, up to where the assistant's next answer begins.

        Tool calls that the template does not write are a BadRow: nothing would stand in their place. A last message
        that was cut off ends with its words: nothing says that its author stopped there.
        """
        text = self._written(_plain(messages), where, prompt=prompt)
        if messages[-1].cut:
            text = text[: self._one(messages, len(messages) - 1, text, where)[1]]
        for n, message in enumerate(messages):
            if message.calls:
                self._check_calls(messages, n, where, prompt=prompt)
        return text

    def _written(self, messages: list[dict[str, Any]], where: str, *, prompt: bool) -> str:
        self._require(where)
        with refusals(where), fixed_date():
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str)
        return text

    def _check_calls(self, messages: tuple[Message, ...], n: int, where: str, *, prompt: bool) -> None:
        plain, message = _plain(messages), messages[n]
        plain[n] |= {key: _renamed(message.extra[key], n) for key in CALLS if key in message.extra}
        if STAND_IN.format(n) not in self._written(plain, where, prompt=prompt):
            raise BadRow(
                f"{where}: message {n + 1}: the chat template writes no tool calls, and without them the answer is"
                f" {'another one' if message.content else 'empty'}; remove the row"
            )

    def encode_marked(self, messages: tuple[Message, ...], where: str) -> tuple[list[int], list[int]]:
        """Tokens and assistant mask of a template that marks the assistant's part itself."""
        self._require(where)
        with refusals(where), fixed_date():
            out: Any = self.tokenizer.apply_chat_template(
                _plain(messages),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
        return list(out["input_ids"]), list(out["assistant_masks"])

    def assistant_spans(self, messages: tuple[Message, ...], text: str, where: str) -> list[Span]:
        """Where in `text`, the rendering of `messages`, each of the assistant's messages stands with its end of turn.

        The end of turn is what the template writes after a last assistant message, without the white space after it:
        `<|im_end|>`, ` </s>`; a template that ends a turn with nothing but white space has that.
        """
        if messages[-1].cut:
            whole = _whole(messages)
            spans = self.assistant_spans(whole, self.render(whole, where), where)
            return [(a, min(b, len(text))) for a, b in spans]
        turns = [n for n, message in enumerate(messages) if message.role == "assistant"]
        contents = self._in_one_pass(messages, turns, text, where)
        if contents is None:
            contents = [self._one(messages, turn, text, where) for turn in turns]
        return [(a, b + _in_common(text[b:], self.end_of_turn)) for a, b in contents]

    @cached_property
    def end_of_turn(self) -> str:
        """What stands behind a last answer: `<|im_end|>`, `</s>`, or white space."""
        word = STAND_IN.format(0)
        text = self.render((Message("user", "x"), Message("assistant", word)), "a first question and answer")
        after = text.rpartition(word)[2]
        return after.rstrip() or after

    def _in_one_pass(self, messages: tuple[Message, ...], turns: list[int], text: str, where: str) -> list[Span] | None:
        """The contents by one rendering with every turn replaced; None when `text` does not agree with it."""
        if any(messages[turn].calls for turn in turns):
            return None
        marked = self.render(_replaced(messages, turns), where)
        pieces = re.split("|".join(re.escape(STAND_IN.format(n)) for n in turns), marked) if turns else [marked]
        if len(pieces) != len(turns) + 1 or not text.startswith(pieces[0]):
            return None
        spans = []
        at = len(pieces[0])
        for turn, piece in zip(turns, pieces[1:], strict=True):
            content = messages[turn].content or ""
            written = next((c for c in (content, content.strip()) if text.startswith(c + piece, at)), None)
            if written is None:
                return None
            spans.append((at, at + len(written)))
            at += len(written) + len(piece)
        return spans if at == len(text) else None

    def _one(self, messages: tuple[Message, ...], turn: int, text: str, where: str) -> Span:
        """The content of one turn, by what stands around it; a turn with thoughts, from the generation prompt on."""
        try:
            marked = self.render(_replaced(messages, [turn]), where)
        except BadRow:  # the template wants the calls that the turn made
            marked = ""
        before, found, after = marked.partition(STAND_IN.format(turn))
        end = len(text) - len(after)
        if found and text.endswith(after):
            if text.startswith(before) and len(before) <= end:
                return len(before), end
            prompt = self.render(messages[:turn], where, prompt=True) if turn else ""
            if prompt and text.startswith(prompt) and len(prompt) <= end:
                return len(prompt), end
        raise BadRow(
            f"{where}: message {turn + 1}: the chat template hides which tokens are the assistant's;"
            " set data.loss_on=all, or use a template with {% generation %}"
        )

    def _require(self, where: str) -> None:
        if self.source is None:
            raise UPQError(
                f"{where}: a conversation, but the model's tokenizer has no chat template;"
                " quantize an instruction-tuned model, or give rows with plain `text`"
            )


@contextmanager
def refusals(where: str) -> Iterator[None]:
    """Turns any exception of a template into one line.

    A template is a program of the model's author. In jinja's sandbox it reaches the messages alone, but it can raise
    any exception: 1 / 0, a recursion without end.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BadRow(f"{where}: the chat template refuses this conversation ({reason}); mend or remove it") from error


def _plain(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content, **message.extra} for message in messages]


def _whole(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """As if the last message had been all."""
    *before, last = messages
    return (*before, replace(last, extra={key: value for key, value in last.extra.items() if key != CUT}))


def _replaced(messages: tuple[Message, ...], turns: list[int]) -> tuple[Message, ...]:
    """With a word in place of all that the assistant says in these turns, its thoughts and calls included."""
    return tuple(Message(m.role, STAND_IN.format(n)) if n in turns else m for n, m in enumerate(messages))


def _renamed(value: Any, n: int) -> Any:
    """Tool calls whose functions all have the stand-in for a name."""
    if isinstance(value, list):
        return [_renamed(one, n) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        k: STAND_IN.format(n) if k == "name" else _renamed(v, n) if k == "function" else v for k, v in value.items()
    }


def _in_common(one: str, other: str) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))

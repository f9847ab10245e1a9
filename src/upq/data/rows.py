"""A row of data to a document, and the account of rows that cannot be used.

An object becomes a document by one column: `field` if the source names it, else the first of COLUMNS that has a value.
A list of messages is a conversation by itself. A text without any character but white space, or null, is no document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from upq.core.errors import UPQError
from upq.data.config import OnBadRow

COLUMNS = ("messages", "conversations", "text")
ROLES = ("system", "user", "assistant", "tool")
# Other names in wide use: ShareGPT's, and the one that OpenAI's newer models have for `system`.
ALIASES = {"human": "user", "gpt": "assistant", "developer": "system"}
CALLS = ("tool_calls", "function_call")  # keys of a message; the second is OpenAI's former spelling
CUT = "cut"  # key of a conversation's last message: true where its author had more to say
FIRST = 100  # rows in which a bad one ends the run, for it shows a wrong file or a wrong setting
PERCENT = 1  # of the rows read may be bad after that


class BadRow(UPQError):
    """A row that cannot be used; the rows around it can."""


@dataclass(frozen=True, slots=True)
class Message:
    """`content` may be None beside tool calls. `extra` holds the row's other keys, for the chat template."""

    role: str
    content: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def calls(self) -> bool:
        return any(self.extra.get(key) for key in CALLS)

    @property
    def cut(self) -> bool:
        return self.extra.get(CUT) is True


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or the messages of one conversation; `where` names its place in error messages."""

    content: str | tuple[Message, ...]
    where: str
    row: int = 0  # its number in the source

    @property
    def size(self) -> int:
        """Characters."""
        content = self.content
        return len(content) if isinstance(content, str) else sum(len(message.content or "") for message in content)

    @property
    def blank(self) -> bool:
        return isinstance(self.content, str) and not self.content.strip()


@dataclass
class Tally:
    """Rows of one source: how many were read, and how many of them could not be used.

    `on_bad_row` error: each bad row ends the run. skip: none does. None: one among the FIRST rows does, and later ones
    as soon as they are more than PERCENT of the rows read.
    """

    on_bad_row: OnBadRow | None
    of_recipe: bool = True  # so that the recipe's key is the remedy
    rows: int = 0
    bad: int = 0
    example: str = ""  # the first bad row, and why

    def next(self) -> int:
        """The number of the row that is read now."""
        self.rows += 1
        return self.rows

    def nothing(self, path: str) -> UPQError:
        """For a source of which nothing has become tokens."""
        if self.bad:
            return UPQError(f"{path}: none of its {self.rows:,} rows can be used ({self.example}); leave it out")
        return UPQError(f"{path}: the model's tokenizer has no token for anything in it; leave it out")

    def reject(self, error: BadRow, row: int) -> None:
        """Count row number `row` as bad, or raise UPQError."""
        if not self.of_recipe:
            raise error
        remedy = "--set data.on_bad_row=skip leaves such rows out"
        if self.on_bad_row == "error" or (self.on_bad_row is None and row <= FIRST):
            raise UPQError(f"{error}; {remedy}") from error
        self.bad += 1
        self.example = self.example or str(error)
        if self.on_bad_row is None and 100 * self.bad > PERCENT * self.rows:
            share = f"{self.bad} of the first {self.rows:,} rows cannot be used, more than {PERCENT} %"
            raise UPQError(f"{error}; {share}; {remedy}") from error


def from_row(row: Any, wanted: str | None, where: str) -> Document:
    """The document of a row; `wanted` is the source's `field`. Raises BadRow."""
    if isinstance(row, list) and row and all(_is_message(item) for item in row):
        return _document(row, "messages", where)
    if not isinstance(row, dict):
        raise BadRow(f'{where}: expected an object such as {{"text": …}}, got {type(row).__name__}')
    columns = columns_of(list(row), wanted)
    if not columns:
        raise BadRow(f"{where}: {_no_column(row, wanted)}")
    column = next((name for name in columns if row[name] not in (None, [])), columns[0])
    return _document(_unpacked(row[column]) if column != "text" else row[column], column, where)


def columns_of(names: list[str], wanted: str | None) -> list[str]:
    """Those of `names` that may hold a document, the first choice first."""
    return [name for name in (COLUMNS if wanted is None else (wanted,)) if name in names]


def no_column(names: list[str], wanted: str | None) -> str:
    """The message for rows that have no such column."""
    asked = " or ".join(map(repr, COLUMNS if wanted is None else (wanted,)))
    return f"no column {asked}; columns here: {', '.join(map(str, names)) or 'none'}; set the source's `field`"


def _no_column(row: dict[str, Any], wanted: str | None) -> str:
    if _is_message(row):
        return 'a message where a row should be; a conversation is {"messages": [{role, content}, …]}'
    lists = {name: value for name, value in row.items() if isinstance(value, list) and value}
    for name, value in lists.items():
        if all(isinstance(item, dict) and not _is_message(item) for item in value):
            return f"one object whose rows are in {name!r}; write these rows one a line, or as one array"
    return no_column(list(row), wanted)


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and bool({"role", "from"} & item.keys())


def _unpacked(value: Any) -> Any:
    """Messages that a table holds as JSON in a text; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            if isinstance(found, list) and found and all(_is_message(item) for item in found):
                return found
    return value


def _document(value: Any, column: str, where: str) -> Document:
    if value is None:
        return Document("", where)
    if isinstance(value, str):
        return Document(_valid(value, where), where)
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else type(value).__name__
        raise BadRow(f"{where}: column {column!r} must be a text or a list of messages, got {kind}; mend the row")
    return Document(tuple(_message(item, f"{where}: message {n}") for n, item in enumerate(value, start=1)), where)


def _message(item: Any, where: str) -> Message:
    keys = item.keys() if isinstance(item, dict) else set()
    role_key, text_key = (
        next((k for k in pair if k in keys), None) for pair in (("role", "from"), ("content", "value"))
    )
    calls = any(item.get(key) for key in CALLS) if keys else False
    if role_key is None or (text_key is None and not calls):
        got = f"keys {', '.join(map(str, keys))}" if isinstance(item, dict) else type(item).__name__
        raise BadRow(f"{where}: expected {{role, content}}, got {got}; mend the row")
    role = ALIASES.get(str(item[role_key]), item[role_key])
    if role not in ROLES:
        raise BadRow(f"{where}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    content = _text(item[text_key] if text_key else None)
    if not isinstance(content, str) and not (content is None and calls):
        raise BadRow(f"{where}: the content must be a text, got {type(content).__name__}; mend the row")
    # Rows of one schema have null for every key that another row has.
    extra = {k: v for k, v in item.items() if k not in (role_key, text_key) and v is not None}
    if extra:
        _valid(json.dumps(extra, ensure_ascii=False, default=str), where)
    return Message(role, content if content is None else _valid(content, where), extra)


def _text(content: Any) -> Any:
    """Content in parts that are all text is one text, as templates write it."""
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        return "".join(part["text"] for part in content)
    return content


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _valid(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise BadRow(f"{where}: half a character, {code} at character {error.start}; mend the row") from None
    return text

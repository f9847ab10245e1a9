"""Where text comes from: files, directories and hub data sets, as one stream of documents in a fixed order.

What a path may be:

- `.txt`, `.text`, `.md`: UTF-8 text; one document, or with `separator: blank_line` one for each block of lines.
- `.jsonl`, `.ndjson`, `.json`: one object a line, one document an object (`.json` may also be one array of objects).
- any of these followed by `.gz`.
- `.parquet`: one document a row; read by row group, only the column that is needed.
- a directory: every file below it, sorted by its path. Hidden files are left out, any other file of an unknown kind is
  an error: to skip it in silence would train on less than what was pointed at.
- otherwise a hub data set, `owner/name`, read as a stream.

An object or a row becomes a document by one column: `field` if the source names it, else the first of `messages`,
`conversations`, `text` that is there. A text without any character but white space is no document and is passed over;
a whole file or data set of nothing else is an error.

A document of text has at most TEXT_BYTES, a row of JSON ROW_BYTES: what is read into memory at one time is bounded
whatever the file, a small `.gz` of gigabytes included. Files themselves may have any size.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from upq.core.errors import UPQError
from upq.data.config import Data, TextSource

DEFAULT_SOURCE = TextSource(path="HuggingFaceFW/fineweb-edu", subset="sample-10BT", weight=1.0)
TEXT = (".txt", ".text", ".md")
LINES = (".jsonl", ".ndjson", ".json")
KINDS = (*TEXT, *LINES, ".parquet")
COLUMNS = ("messages", "conversations", "text")
TEXT_BYTES = 128 << 20
ROW_BYTES = 32 << 20  # `[],` makes 64 bytes of 3
_PIECE = 1 << 20  # characters of an array, read at a time
# Not ijson 3.6: its yajl2_c makes `?` of half a character (\ud800), refuses NaN and integers of 64 bits, and takes all
# memory for 100 KB of `[`; its Python backend reads 4 MB a second, this 30.
_JSON = json.JSONDecoder()
ROLES = ("system", "user", "assistant", "tool")
# The other spelling in wide use, {from, value}, with its names for the roles.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or the messages of one conversation; `where` names its place in error messages."""

    content: str | tuple[Message, ...]
    where: str


def sources_of(section: Data) -> tuple[TextSource, ...]:
    """The sources of a recipe's section; without any, the default open pre-training set."""
    if not section.sources and section.loss_on == "assistant":
        raise UPQError(
            "data.loss_on: assistant needs conversations and the default data set has none;"
            " name a file of conversations with --data, or set data.loss_on=all"
        )
    return section.sources or (DEFAULT_SOURCE,)


def read_documents(source: TextSource) -> Iterator[Document]:
    """Stream the documents of a source; the order is always the same. Errors name file, line and remedy."""
    files = _files(source)
    return _hub(source) if files is None else _local(source, files)


def identity(source: TextSource) -> str:
    """What the source is made of: a hash over names, sizes and contents of local files, or the hub id."""
    files = _files(source)
    if files is None:
        return "hub:" + "/".join(part for part in (source.path, source.subset, source.split) if part)
    root = Path(source.path).expanduser()
    whole = hashlib.sha256()
    for file in files:
        with _opened(file, compressed=False) as raw:
            content = hashlib.file_digest(raw, "sha256").hexdigest()  # type: ignore[arg-type]
        if file == root:
            return f"sha256:{content}"
        whole.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0{content}\n".encode())
    return f"sha256:{whole.hexdigest()}"


# Files


def _files(source: TextSource) -> list[Path] | None:
    """The local files of a source in reading order; None when it is a hub data set."""
    root = Path(source.path).expanduser()
    if root.is_dir():
        return _directory(root)
    if root.exists():
        if _kind(root) is None:
            raise UPQError(f"{root}: cannot read this kind of file; convert it to one of {', '.join(KINDS)}")
        return [root]
    if _kind(root) is not None or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path) or source.path.startswith("."):
        raise UPQError(f"{source.path}: no such file or directory; check the path given by --data or data.sources")
    return None


def _directory(root: Path) -> list[Path]:
    found = []
    for path in sorted(root.rglob("*"), key=lambda p: p.relative_to(root).as_posix()):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or not path.is_file():
            continue
        if _kind(path) is None:
            raise UPQError(
                f"{path}: cannot read this kind of file; move it out of the directory,"
                f" or name the files to use ({', '.join(KINDS)})"
            )
        found.append(path)
    if not found:
        raise UPQError(f"{root}: no text in this directory; it should hold files of the kinds {', '.join(KINDS)}")
    return found


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in KINDS and not (suffix == ".parquet" and name.endswith(".gz")) else None


def _local(source: TextSource, files: Iterable[Path]) -> Iterator[Document]:
    for file in files:
        kind = _kind(file)
        read: Callable[[Path, TextSource], Iterator[Document]] = _parquet
        if kind in TEXT:
            read = _text_blocks if source.separator == "blank_line" else _text_file
        elif kind in LINES:
            read = _json_array if kind == ".json" and _starts_array(file) else _json_lines
        yield from _never_empty(read(file, source), str(file))


def _never_empty(documents: Iterator[Document], where: str) -> Iterator[Document]:
    some = False
    for document in documents:
        if not isinstance(document.content, str) or document.content.strip():
            some = True
            yield document
    if not some:
        raise UPQError(f"{where}: no text in it; remove it from the data or fill it")


def _opened(file: Path, *, compressed: bool = True) -> BinaryIO:
    try:
        return gzip.open(file) if compressed and file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise UPQError(f"{file}: cannot be opened ({error.strerror}); check its permissions") from error


def _lines(file: Path, limit: int) -> Iterator[tuple[int, str]]:
    """Numbered lines, each with its end; a line that is not text is an error that names the byte."""
    offset = 0
    with _reading(file) as raw:
        for number, line in enumerate(iter(lambda: raw.readline(limit + 1), b""), start=1):
            if len(line) > limit:
                raise _too_long(f"{file}:{number}", limit)
            yield number, _decode(line, file, offset)
            offset += len(line)


@contextmanager
def _reading(file: Path) -> Iterator[BinaryIO]:
    try:
        with _opened(file) as raw:
            yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UPQError(f"{file}: damaged gzip file ({error}); compress or download it again") from error
    except OSError as error:
        raise UPQError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error


def _too_long(where: str, limit: int) -> UPQError:
    remedy = "split the text, or set the source's `separator: blank_line`" if limit == TEXT_BYTES else "split the row"
    return UPQError(f"{where}: a document of more than {limit >> 20} MB; {remedy}")


def _decode(raw: bytes, file: Path, offset: int) -> str:
    zero = raw.find(b"\0")
    if zero >= 0:
        raise _binary(file, offset + zero)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_text(file, offset + error.start) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _binary(file: Path, at: int) -> UPQError:
    remedy = f"only text files can have this name; other kinds are {', '.join(LINES)}, .parquet"
    return UPQError(f"{file}: binary data, a zero byte at byte {at}; {remedy}")


def _no_text(file: Path, at: int) -> UPQError:
    return UPQError(f"{file}: not UTF-8 text at byte {at}; convert the file, for example with iconv")


def _text_file(file: Path, source: TextSource) -> Iterator[Document]:
    with _reading(file) as raw:
        whole = raw.read(TEXT_BYTES + 1)
    if len(whole) > TEXT_BYTES:
        raise _too_long(str(file), TEXT_BYTES)
    yield Document(_decode(whole, file, 0), str(file))


def _text_blocks(file: Path, source: TextSource) -> Iterator[Document]:
    block: list[str] = []
    first, size = 1, 0
    for number, line in _lines(file, TEXT_BYTES):
        if line.strip():
            first, size = (first, size + len(line)) if block else (number, len(line))
            if size > TEXT_BYTES:
                raise _too_long(f"{file}:{first}", TEXT_BYTES)
            block.append(line)
        elif block:
            yield Document("".join(block).rstrip("\r\n"), f"{file}:{first}")
            block = []
    if block:
        yield Document("".join(block).rstrip("\r\n"), f"{file}:{first}")


def _json_lines(file: Path, source: TextSource) -> Iterator[Document]:
    for number, line in _lines(file, ROW_BYTES):
        if line.strip():
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UPQError(f"{where}: invalid JSON ({error}); each line must hold one whole object") from None
            yield _from_row(row, source, where)


def _json_array(file: Path, source: TextSource) -> Iterator[Document]:
    for number, row in enumerate(_items(file), start=1):
        yield _from_row(row, source, f"{file}: item {number}")


def _items(file: Path) -> Iterator[Any]:
    """The items of one JSON array, each parsed as soon as it is there: the whole may be larger than memory."""
    with _reading(file) as raw:
        text = _Ahead(raw, file)
        text.take("[")
        if text.peek() == "]":
            text.take("]")
        else:
            yield text.value()
            while text.take(",]") == ",":
                yield text.value()
        if text.peek():
            raise text.wrong("extra data")


class _Ahead:
    """The text of a file from where reading stands, as far as it has been needed."""

    def __init__(self, raw: BinaryIO, file: Path) -> None:
        self._raw, self._file = raw, file
        self._decoded = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        self._text, self._at, self._line = "", 0, 1

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if not self._more(_PIECE):
                return ""

    def take(self, characters: str) -> str:
        found = self.peek()
        if not found or found not in characters:
            raise self.wrong(f"expected {' or '.join(map(repr, characters))}")
        self._at += 1
        return found

    def value(self) -> Any:
        self.peek()
        piece, whole = _PIECE, False
        while True:
            try:
                value, end = _JSON.raw_decode(self._text, self._at)
                # A number at the end of what has been read may go on.
                if end < len(self._text) or whole:
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if whole:
                    raise self.wrong(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.wrong(str(error)) from None
            if (held := len(self._text) - self._at) > ROW_BYTES:
                raise _too_long(f"{self._file}:{self._line}", ROW_BYTES)
            whole = not self._more(min(piece, ROW_BYTES + 1 - held))
            piece *= 2  # so that an item is not parsed again for each megabyte of it

    def _more(self, size: int) -> bool:
        self._line += self._text.count("\n", 0, self._at)
        try:
            text = self._decoded.read(size)
        except UnicodeDecodeError as error:  # its object ends where the file has been read to
            raise _no_text(self._file, self._raw.tell() - len(error.object) + error.start) from error
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(text)

    def wrong(self, what: str, at: int | None = None) -> UPQError:
        line = self._line + self._text.count("\n", 0, self._at if at is None else at)
        return UPQError(f"{self._file}:{line}: invalid JSON ({what}); mend the file")


def _starts_array(file: Path) -> bool:
    with _reading(file) as raw:
        return _Ahead(raw, file).peek() == "["


def _parquet(file: Path, source: TextSource) -> Iterator[Document]:
    import pyarrow as pa  # costs a second: only where a source needs it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            column = _column(table.schema_arrow.names, source, str(file))
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(column).to_pylist():
                    number += 1
                    yield _document(value, column, f"{file}: row {number}")
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:  # text that is not UTF-8 is a ValueError
        raise UPQError(f"{file}: not a readable parquet file ({_first_line(error)}); write it again") from error


# Hub data sets


def _hub(source: TextSource) -> Iterator[Document]:
    from datasets import load_dataset  # costs seconds: only where a source needs it

    def rows() -> Iterator[Any]:
        # Anything may be raised between here and the hub, and every cause has the same remedy.
        try:
            yield from load_dataset(source.path, source.subset, split=source.split, streaming=True)
        except Exception as error:
            default = source.path == DEFAULT_SOURCE.path
            what = "the default data set, cannot be read" if default else "neither a local path nor a readable data set"
            remedy = "name your own text with --data PATH" if default else "check the id, subset and split, or name"
            remedy += "" if default else " local files with --data PATH"
            raise UPQError(f"{source.path}: {what} from the hub ({_first_line(error)}); {remedy}") from error

    documents = (_from_row(row, source, f"{source.path}: row {n}") for n, row in enumerate(rows(), start=1))
    return _never_empty(documents, source.path)


# Rows


def _from_row(row: Any, source: TextSource, where: str) -> Document:
    if not isinstance(row, dict):
        raise UPQError(f'{where}: expected an object such as {{"text": …}}, got {type(row).__name__}')
    column = _column(list(row), source, where)
    return _document(row[column], column, where)


def _column(names: list[str], source: TextSource, where: str) -> str:
    wanted = COLUMNS if source.field is None else (source.field,)
    for name in wanted:
        if name in names:
            return name
    found = ", ".join(map(str, names)) or "none"
    raise UPQError(
        f"{where}: no column {' or '.join(map(repr, wanted))}; columns here: {found}; set the source's `field`"
    )


def _document(value: Any, column: str, where: str) -> Document:
    if isinstance(value, str):
        return Document(_valid(value, where), where)
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else type(value).__name__
        raise UPQError(f"{where}: column {column!r} must be a text or a list of messages, got {kind}; mend the row")
    return Document(tuple(_message(item, f"{where}: message {n}") for n, item in enumerate(value, start=1)), where)


def _message(item: Any, where: str) -> Message:
    if isinstance(item, dict) and {"role", "content"} <= item.keys():
        role, content = item["role"], item["content"]
    elif isinstance(item, dict) and {"from", "value"} <= item.keys():
        role, content = SHAREGPT_ROLES.get(str(item["from"]), item["from"]), item["value"]
    else:
        got = f"keys {', '.join(map(str, item))}" if isinstance(item, dict) else type(item).__name__
        raise UPQError(f"{where}: expected {{role, content}}, got {got}; mend the row")
    if role not in ROLES:
        raise UPQError(f"{where}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UPQError(f"{where}: the content must be a text, got {type(content).__name__}; mend the row")
    return Message(role, _valid(content, where))


def _valid(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise UPQError(f"{where}: half a character, {code} at character {error.start}; mend the row") from None
    return text


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""Where text comes from: files, directories and hub data sets, as one stream of documents in a fixed order.

What a path may be:

- `.txt`, `.text`, `.md`: UTF-8 text; one document, or with `separator: blank_line` one for each block of lines.
- `.jsonl`, `.ndjson`, `.json`: one object a line, one document an object; or one array of objects, or objects over
  several lines.
- any of these followed by `.gz`.
- `.parquet`: one document a row; read by row group, only the columns that may hold it.
- a directory: every file below it, sorted by its path. Hidden files are left out, and those that describe a data set
  (README.md, LICENSE). Any other file of an unknown kind is an error: to skip it in silence would train on less than
  what was pointed at.
- otherwise a hub data set, `owner/name`, read as a stream.

Lines end with LF, CR LF or CR. `upq.data.rows` says which column of a row is the document. A text without any character
but white space is no document and is passed over; a whole file or data set of nothing else is an error.

A document of text has at most TEXT_BYTES, a row of JSON ROW_BYTES: what is read into memory at one time is bounded
whatever the file, a small `.gz` of gigabytes included. Files themselves may have any size.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from upq.core.errors import UPQError
from upq.core.paths import local
from upq.core.pointers import check_pointer
from upq.data.config import Data, TextSource
from upq.data.rows import BadRow, Document, Tally, columns_of, from_row, no_column

DEFAULT_SOURCE = TextSource(path="HuggingFaceFW/fineweb-edu", subset="sample-10BT", weight=1.0)
TEXT = (".txt", ".text", ".md")
LINES = (".jsonl", ".ndjson", ".json")
KINDS = (*TEXT, *LINES, ".parquet")
TEXT_BYTES = 128 << 20
ROW_BYTES = 32 << 20  # `[],` makes 64 bytes of 3
# Files that a cloned data set has beside its data: their names without the suffix, and the hub's own files.
ABOUT = ("readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "authors")
RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_PIECE = 1 << 20  # characters of an array, bytes of lines, read at a time
# Not ijson 3.6: its yajl2_c makes `?` of half a character (\ud800), refuses NaN and integers of 64 bits, and takes all
# memory for 100 KB of `[`; its Python backend reads 4 MB a second, this 30.
_JSON = json.JSONDecoder()
_END = re.compile(rb"\r\n|\r|\n")
_OPENING = ("{", "[", "[{")  # first lines of JSON that is written over several

# What stands at one place of a file: a text, a parsed row, or why there is none.
Found = tuple[Any, str]


def sources_of(section: Data) -> tuple[TextSource, ...]:
    """The sources of a recipe's section; without any, the default open pre-training set."""
    if not section.sources and section.loss_on == "assistant":
        raise UPQError(
            "data.loss_on: assistant needs conversations and the default data set has none;"
            " name a file of conversations with --data, or set data.loss_on=all"
        )
    return section.sources or (DEFAULT_SOURCE,)


def read_documents(source: TextSource, tally: Tally | None = None) -> Iterator[Document]:
    """Stream the documents of a source; the order is always the same. Errors name file, line and remedy.

    `tally` counts rows, and decides about those that cannot be used. Without it each of them is an error.
    """
    files, tally = _files(source), tally or Tally("error", of_recipe=False)
    if files is None:
        yield from _documents(_hub(source), source, source.path, tally)
        return
    for file in files:
        yield from _documents(_rows_of(file, source), source, str(file), tally)


def left_out(source: TextSource) -> list[Path]:
    """Files of a directory that describe the data and are no part of it."""
    root = local(source.path)
    return [path for path in _visible(root) if _describes(path, root)] if root.is_dir() else []


def identity(source: TextSource) -> str:
    """What the source is made of: a hash over names, sizes and contents of local files, or the hub id."""
    files = _files(source)
    if files is None:
        return "hub:" + "/".join(part for part in (source.path, source.subset, source.split) if part)
    root = local(source.path)
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
    root = local(source.path)
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
    found = [path for path in _visible(root) if not _describes(path, root)]
    for path in found:
        if _kind(path) is None:
            raise UPQError(
                f"{path}: cannot read this kind of file; move it out of the directory,"
                f" or name the files to use ({', '.join(KINDS)})"
            )
    if not found:
        raise UPQError(f"{root}: no text in this directory; it should hold files of the kinds {', '.join(KINDS)}")
    return found


def _visible(root: Path) -> list[Path]:
    """Files below `root` that are not hidden, links followed, sorted by path."""
    found, seen = list[Path](), set[Path]()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := Path(folder).resolve()) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    for path in found:
        if not path.exists():  # git-annex has these in place of files until they are fetched
            raise UPQError(f"{path}: a link to a file that is not here; fetch the file, or remove the link")
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def _describes(path: Path, root: Path) -> bool:
    name = path.name.lower()
    stem, _, suffix = name.partition(".")
    about = stem in ABOUT and suffix in ("", "md", "txt", "rst", "cff", "bib")
    return about or name in RECORDS or path == root / f"{root.name}.py"  # the last is a script that loads the data


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in KINDS and not (suffix == ".parquet" and name.endswith(".gz")) else None


def _rows_of(file: Path, source: TextSource) -> Iterator[Found]:
    check_pointer(file)
    kind = _kind(file)
    if kind in TEXT:
        return (_text_blocks if source.separator == "blank_line" else _text_file)(file)
    if kind in LINES:
        return _json(file)
    return _parquet(file, source)


def _documents(found: Iterator[Found], source: TextSource, where: str, tally: Tally) -> Iterator[Document]:
    some, bad = False, 0
    for row, place in found:
        number = tally.next()
        try:
            document = row if isinstance(row, Document) else _parsed(row, source, place)
        except BadRow as error:
            tally.reject(error, number)
            bad += 1
            continue
        if not document.blank:
            some = True
            yield replace(document, row=number)
    if not some:
        left = f"; {bad} rows cannot be used, the first: {tally.example}" if bad else ""
        raise UPQError(f"{where}: no text in it; remove it from the data or fill it{left}")


def _parsed(row: Any, source: TextSource, where: str) -> Document:
    if isinstance(row, BadRow):
        raise row
    return from_row(row, source.field, where)


def _opened(file: Path, *, compressed: bool = True) -> BinaryIO:
    try:
        return gzip.open(file) if compressed and file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise UPQError(f"{file}: cannot be opened ({error.strerror}); check its permissions") from error


def _lines(file: Path, limit: int) -> Iterator[tuple[int, str]]:
    """Numbered lines, each with its end; a line that is not text is an error that names the byte."""
    offset = 0
    for number, line in enumerate(_raw_lines(file, limit), start=1):
        if len(line) > limit:
            raise _too_long(f"{file}:{number}", limit)
        yield number, _decode(line, file, offset)
        offset += len(line)


def _raw_lines(file: Path, limit: int) -> Iterator[bytes]:
    """Lines with their ends; of one that is longer than `limit` more than that, and no other."""
    with _reading(file) as raw:
        pieces, held = list[bytes](), 0  # the line that has been begun
        while piece := raw.read(_PIECE):
            if piece.endswith(b"\r"):
                piece += raw.read(1)  # an LF behind it belongs to the same end
            at = 0
            for end in _END.finditer(piece):
                yield b"".join((*pieces, piece[at : end.end()]))
                pieces, held, at = [], 0, end.end()
            pieces.append(piece[at:])
            held += len(pieces[-1])
            if held > limit:
                break
        if held:
            yield b"".join(pieces)


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


def _text_file(file: Path) -> Iterator[Found]:
    with _reading(file) as raw:
        whole = raw.read(TEXT_BYTES + 1)
    if len(whole) > TEXT_BYTES:
        raise _too_long(str(file), TEXT_BYTES)
    yield Document(_decode(whole, file, 0), str(file)), str(file)


def _text_blocks(file: Path) -> Iterator[Found]:
    block: list[str] = []
    first, size = 1, 0

    def document() -> Found:
        where = f"{file}:{first}"
        return Document("".join(block).rstrip("\r\n"), where), where

    for number, line in _lines(file, TEXT_BYTES):
        if line.strip():
            first, size = (first, size + len(line)) if block else (number, len(line))
            if size > TEXT_BYTES:
                raise _too_long(f"{file}:{first}", TEXT_BYTES)
            block.append(line)
        elif block:
            yield document()
            block = []
    if block:
        yield document()


def _json(file: Path) -> Iterator[Found]:
    """Rows of a file of lines, or of values over several lines; the beginning says which it is."""
    first, another = _first_line_of(file)
    streamed = file.name.lower().removesuffix(".gz").endswith(".json") or first in _OPENING
    if streamed and (not _is_value(first) if another else first.startswith("[")):
        yield from _json_values(file)
    else:
        yield from _json_lines(file)


def _is_value(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _first_line_of(file: Path) -> tuple[str, bool]:
    """The first line that is not blank, and whether there is another; of a row that is too long its beginning."""
    found = ""
    for line in _raw_lines(file, ROW_BYTES):
        if line.strip():
            if found:
                return found, True
            found = line[:ROW_BYTES].decode(errors="replace").removeprefix("\ufeff").strip()
    return found, False


def _json_lines(file: Path) -> Iterator[Found]:
    for number, line in _lines(file, ROW_BYTES):
        if line.strip():
            where = f"{file}:{number}"
            try:
                yield json.loads(line), where
            except (ValueError, RecursionError) as error:
                yield BadRow(f"{where}: invalid JSON ({error}); each line must hold one whole object"), where


def _json_values(file: Path) -> Iterator[Found]:
    with _reading(file) as raw:
        array = _Ahead(raw, file).peek() == "["
    for number, row in enumerate(_items(file) if array else _values(file), start=1):
        yield row, f"{file}: item {number}"


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


def _values(file: Path) -> Iterator[Any]:
    """JSON values one after the other, each parsed as soon as it is there."""
    with _reading(file) as raw:
        text = _Ahead(raw, file)
        while text.peek():
            yield text.value()


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


def _parquet(file: Path, source: TextSource) -> Iterator[Found]:
    import pyarrow as pa  # costs a second: only where a source needs it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            columns = columns_of(names, source.field)
            if not columns:
                raise UPQError(f"{file}: {no_column(names, source.field)}")
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{file}: row {number}"
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:  # text that is not UTF-8 is a ValueError
        raise UPQError(f"{file}: not a readable parquet file ({_first_line(error)}); write it again") from error


# Hub data sets


def _hub(source: TextSource) -> Iterator[Found]:
    from datasets import load_dataset  # costs seconds: only where a source needs it

    # Anything may be raised between here and the hub, and every cause has the same remedy.
    try:
        rows = load_dataset(source.path, source.subset, split=source.split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield row, f"{source.path}: row {number}"
    except Exception as error:
        default = source.path == DEFAULT_SOURCE.path
        what = "the default data set, cannot be read" if default else "neither a local path nor a readable data set"
        remedy = "name your own text with --data PATH" if default else "check the id, subset and split, or name"
        remedy += "" if default else " local files with --data PATH"
        raise UPQError(f"{source.path}: {what} from the hub ({_first_line(error)}); {remedy}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

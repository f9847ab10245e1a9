"""Documents come out as they went in, in a fixed order; what cannot be read is named with its place and the remedy."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from upq.core.errors import UPQError
from upq.data import DEFAULT_SOURCE, Message, read_documents
from upq.data.config import Data, TextSource
from upq.data.sources import identity, sources_of
from upq.run.api import recipe_of

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
MESSAGES = (Message("user", "Hi"), Message("assistant", "Ho"))
SHARED = Path(__file__).parents[2] / "shared" / "data"


def contents(path: Path | str, **options: Any) -> list[Any]:
    return [document.content for document in read_documents(TextSource(path=str(path), **options))]


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.text", "a.md", "A.TXT"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path, name: str) -> None:
    text = "  Zoë\r\n\r\nsecond\n"
    assert contents(written(tmp_path / name, text)) == [text]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert contents(written(tmp_path / "a.txt", b"\xef\xbb\xbfhi")) == ["hi"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_separate_documents(tmp_path: Path, end: str) -> None:
    text = end.join(["", "one", "two", " ", "", "three"])
    file = written(tmp_path / "a.txt", text)
    assert contents(file, separator="blank_line") == [f"one{end}two", "three"]
    places = [d.where for d in read_documents(TextSource(path=str(file), separator="blank_line"))]
    assert places == [f"{file}:2", f"{file}:6"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz"])
def test_each_line_is_a_document(tmp_path: Path, name: str) -> None:
    text = lines({"text": "one", "id": 1}) + "\n" + lines({"messages": CHAT, "text": "not this"})
    raw = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
    assert contents(written(tmp_path / name, raw)) == ["one", MESSAGES]


def test_a_json_file_may_be_one_array(tmp_path: Path) -> None:
    file = written(tmp_path / "a.json", json.dumps([{"text": "one"}, {"text": "two"}], indent=2))
    assert contents(file) == ["one", "two"]


def test_the_other_spelling_of_conversations(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    assert contents(written(tmp_path / "a.jsonl", lines(row))) == [MESSAGES]


def test_field_names_the_column(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", lines({"text": "no", "body": "yes"}))
    assert contents(file, field="body") == ["yes"]


def test_parquet_streams_rows_of_all_groups(tmp_path: Path) -> None:
    texts = [f"row {n}" for n in range(1000)]
    pq.write_table(pa.table({"text": texts, "n": range(1000)}), tmp_path / "a.parquet", row_group_size=300)
    assert contents(tmp_path / "a.parquet") == texts
    pq.write_table(pa.table({"messages": [CHAT]}), tmp_path / "b.parquet")
    assert contents(tmp_path / "b.parquet") == [MESSAGES]


def test_a_directory_is_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b/a.txt", "a.jsonl", "b.txt", ".git/x.bin", ".hidden"):
        written(tmp_path / name, lines({"text": name}) if name.endswith("jsonl") else name)
    assert contents(tmp_path) == ["a.jsonl", "b.txt", "b/a.txt"]


def test_links_are_followed_and_one_to_nothing_is_named(tmp_path: Path) -> None:
    written(tmp_path / "far" / "b.txt", "b")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "far")
    written(tmp_path / "d" / "a.txt", "a")
    (tmp_path / "d" / "far").symlink_to("../far")
    assert contents(tmp_path / "d") == ["a", "b"]
    (tmp_path / "d" / "c.txt").symlink_to("annexed")
    with pytest.raises(UPQError, match=r"c\.txt: a link to a file that is not here; fetch the file"):
        contents(tmp_path / "d")


def test_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "a.txt", "a")
    assert contents("~/a.txt") == contents("~") == ["a"]
    assert recipe_of("default", {}, "~/a.txt").data.sources[0].path == "~/a.txt"
    with pytest.raises(UPQError, match=r"~/b\.txt: no such file"):
        recipe_of("default", {}, "~/b.txt")
    with pytest.raises(UPQError, match=r"~nobody-here/a\.txt: no such file"):
        contents("~nobody-here/a.txt")


def test_a_git_lfs_pointer_is_no_text(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456789\n"
    for name in ("a.jsonl", "a.txt", "a.parquet", "a.json.gz"):
        with pytest.raises(UPQError, match=rf"{name}: a Git LFS pointer, .*; run `git lfs pull` in {tmp_path}"):
            contents(written(tmp_path / name, pointer))


def test_texts_without_a_character_are_passed_over(tmp_path: Path) -> None:
    assert contents(written(tmp_path / "a.jsonl", lines({"text": ""}, {"text": "x"}, {"text": " \n"}))) == ["x"]


def test_reading_is_lazy(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", lines({"text": "good"}) + "{broken\n")
    documents = read_documents(TextSource(path=str(file)))
    assert next(documents).content == "good"
    with pytest.raises(UPQError, match=r"a\.jsonl:2: invalid JSON"):
        next(documents)


BAD: dict[str, tuple[str, str | bytes, str]] = {
    "empty text": ("a.txt", "", r"a\.txt: no text in it; remove"),
    "blank text": ("a.txt", " \n\n", r"a\.txt: no text in it"),
    "empty lines": ("a.jsonl", "", r"a\.jsonl: no text in it"),
    "only empty rows": ("a.jsonl", lines({"text": ""}), r"a\.jsonl: no text in it"),
    "not UTF-8": ("a.txt", b"good\nbad \xff here", r"a\.txt: not UTF-8 text at byte 9; convert"),
    "not UTF-8 in a row": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"not UTF-8 text at byte 24; convert"),
    "binary": ("a.txt", b"PNG\n\0\0", r"a\.txt: binary data, a zero byte at byte 4; .*\.parquet"),
    "broken gzip": ("a.txt.gz", gzip.compress(b"x" * 999)[:-9], r"a\.txt\.gz: damaged gzip .*download"),
    "not gzip": ("a.txt.gz", b"hello", r"a\.txt\.gz: damaged gzip"),
    "broken JSON": ("a.jsonl", '{"text": "a"}\n{"text"\n', r"a\.jsonl:2: invalid JSON .*one whole object"),
    "broken array": ("a.json", '[{"text": "a"},\n{"text"]', r"a\.json:2: invalid JSON .*mend"),
    "no object": ("a.jsonl", '"hello"\n', r"a\.jsonl:1: expected an object .*got str"),
    "no column": ("a.jsonl", lines({"a": 1, "b": 2}), r"a\.jsonl:1: no column .*'text'; columns here: a, b; .*field"),
    "wrong type": ("a.jsonl", lines({"text": 3}), r"a\.jsonl:1: column 'text' must be a text or a list .*int"),
    "null": ("a.jsonl", lines({"text": None}), r"a\.jsonl: no text in it"),
    "no messages": ("a.jsonl", lines({"messages": []}), r"a\.jsonl:1: column 'messages' .*empty list"),
    "wrong role": (
        "a.jsonl",
        lines({"messages": [*CHAT, {"role": "bot", "content": "x"}]}),
        r"a\.jsonl:1: message 3: unknown role 'bot'; use one of system, user, assistant, tool",
    ),
    "no role": ("a.jsonl", lines({"messages": [{"content": "x"}]}), r":1: message 1: expected \{role, content\}"),
    "content in parts": (
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        r":1: message 1: the content must be a text, got list",
    ),
    "half a character": ("a.jsonl", '{"text": "ab\\ud800"}\n', r":1: half a character, \\ud800 at character 2; mend"),
    "not parquet": ("a.parquet", b"PAR0", r"a\.parquet: not a readable parquet file"),
    "unknown kind": ("a.docx", b"x", r"a\.docx: cannot read this kind of file; convert it to one of \.txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_with_place_and_remedy(tmp_path: Path, name: str) -> None:
    file, text, message = BAD[name]
    with pytest.raises(UPQError, match=message) as caught:
        contents(written(tmp_path / file, text))
    assert "\n" not in str(caught.value)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UPQError, match=r"a\.parquet: no column .*columns here: body; set the source's `field`"):
        contents(tmp_path / "a.parquet")


def test_parquet_of_another_type_names_the_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [None, 3]}), tmp_path / "a.parquet")
    with pytest.raises(UPQError, match=r"a\.parquet: row 2: column 'text' .*int"):
        contents(tmp_path / "a.parquet")


@pytest.mark.parametrize("path", ["missing.txt", "./missing", "/no/such/place", "a/b/c", "~/no-such-upq", "two words"])
def test_a_missing_path(path: str) -> None:
    with pytest.raises(UPQError, match=r"no such file or directory; check the path given by --data"):
        contents(path)


def test_a_directory_without_text(tmp_path: Path) -> None:
    with pytest.raises(UPQError, match=r"no text in this directory; it should hold files of the kinds \.txt"):
        contents(tmp_path)


def test_a_directory_with_a_file_nobody_would_read(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "x")
    written(tmp_path / "b.csv", "x")
    with pytest.raises(UPQError, match=r"b\.csv: cannot read this kind of file; move it out of the directory"):
        contents(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="the superuser may read every file")
def test_a_forbidden_file(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "x").chmod(0)
    with pytest.raises(UPQError, match=r"a\.txt: cannot be opened .*check its permissions"):
        contents(tmp_path / "a.txt")


def test_hub_data_sets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, name: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        assert streaming
        return [{"text": f"{path} {name} {split}"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert contents("owner/name", subset="small", split="test") == ["owner/name small test"]
    assert contents(**DEFAULT_SOURCE.model_dump()) == ["HuggingFaceFW/fineweb-edu sample-10BT train"]
    assert identity(DEFAULT_SOURCE) == "hub:HuggingFaceFW/fineweb-edu/sample-10BT/train"


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UPQError, match=r"fineweb-edu: the default data set, .*\(Couldn't reach it\); .*--data PATH$"):
        contents(**DEFAULT_SOURCE.model_dump())
    with pytest.raises(
        UPQError, match=r"owner/name: neither a local path nor .*subset and split, or name local .*--data"
    ):
        contents("owner/name")


def test_no_sources_mean_the_default_and_assistant_training_needs_some() -> None:
    assert sources_of(Data()) == (DEFAULT_SOURCE,)
    with pytest.raises(UPQError, match=r"loss_on: assistant needs conversations .*--data"):
        sources_of(Data(loss_on="assistant"))


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda d: written(d / "a.txt", "other"),
    "name": lambda d: (d / "a.txt").rename(d / "c.txt"),
    "one more": lambda d: written(d / "z.txt", "x"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_identity_follows_content(tmp_path: Path, name: str) -> None:
    written(tmp_path / "a.txt", "first")
    written(tmp_path / "b.txt", "second")
    before = identity(TextSource(path=str(tmp_path)))
    assert identity(TextSource(path=str(tmp_path))) == before
    CHANGES[name](tmp_path)
    assert identity(TextSource(path=str(tmp_path))) != before


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data beside the repository")
def test_real_files() -> None:
    books = list(read_documents(TextSource(path=str(SHARED / "text" / "books.jsonl"))))
    assert len(books) == 55
    stories = SHARED / "text" / "tinystories_heldout.txt"
    blocks = contents(stories, separator="blank_line")
    assert "\n\n".join(blocks).split() == stories.read_text().split()
    assert all(len(c) >= 2 for c in contents(SHARED / "instruct" / "chats.jsonl"))

"""Rows as people have them: what can be read is read as it stands, what cannot be used is counted or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiny import byte_tokenizer
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.data import prepare, read_documents
from upq.data.config import Data, TextSource
from upq.data.encoding import Encoder
from upq.data.rows import Document, Message, Tally, from_row

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOLS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|end|>{% endfor %}"
)
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + PLAIN.partition("%}")[2]
)


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def talk(n: int = 1) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"How many, {n}?"}, {"role": "assistant", "content": f"{n * 7}."}]}


def calling(content: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "What is the weather in Paris?"},
            {"role": "assistant", "content": content, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ]
    }


def lines(path: Path, *rows: Any, end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(row) + end for row in rows).encode())
    return path


def contents(path: Path, **options: Any) -> list[Any]:
    return [document.content for document in read_documents(TextSource(path=str(path), **options))]


def encoded(row: dict[str, Any], template: str, **options: Any) -> Any:
    tokenizer = byte_tokenizer(eos="<|end|>", chat_template=template)
    (one,) = Encoder(tokenizer, **options).encode([from_row(row, None, "f:1")])
    return tokenizer.decode(one.tokens_L.tolist()), one


def pack(folder: Path, file: Path, template: str = PLAIN, **options: Any) -> tuple[Any, list[str]]:
    notes, data = Notes(), Data(sources=(TextSource(path=str(file)),), seq_len=16, validation=1, **options)
    tokenizer = byte_tokenizer(eos="<|end|>", chat_template=template)
    return prepare(data, tokenizer, folder / "rows.safetensors", sequences=10_000, seed=0, progress=notes), notes.lines


# Tool calls


@pytest.mark.parametrize("content", [None, ""])
def test_a_template_gets_calls_and_content_as_they_stand(content: str | None) -> None:
    row = calling(content)
    text, _ = encoded(row, TOOLS)
    written = byte_tokenizer(eos="<|end|>", chat_template=TOOLS).apply_chat_template(row["messages"], tokenize=False)
    assert text == written
    assert '<|assistant|><call>{"name": "weather"' in text


@pytest.mark.parametrize("content", [None, "", "I look."])
@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_calls_that_the_template_leaves_out_are_no_answer(content: str | None, key: str) -> None:
    """The word of the function stands in the question too: it is not looked for there."""
    row = calling(content)
    row["messages"][1].pop("tool_calls")
    row["messages"][1][key] = [CALL] if key == "tool_calls" else CALL["function"]
    what = "another one" if content else "empty"
    with pytest.raises(
        UPQError, match=rf"f:1: message 2: the chat template writes no tool calls, .* is {what}; remove"
    ):
        encoded(row, PLAIN)


def test_a_null_content_is_not_the_word_none() -> None:
    template = TOOLS.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ m.content }}")
    assert encoded(calling(None), template)[0] == encoded(calling(""), template)[0]


def test_calls_are_targets_of_the_assistant() -> None:
    text, one = encoded(calling(None), TOOLS, loss_on="assistant")
    tokenizer = byte_tokenizer(eos="<|end|>", chat_template=TOOLS)
    marked = tokenizer.decode([t for t, on in zip(one.tokens_L.tolist(), one.mask_L.tolist(), strict=True) if on])
    call = text[text.index("<call>") : text.index("</call>")] + "</call>"
    assert marked == f"{call}<|end|>It is sunny.<|end|>"


def test_a_message_without_content_needs_calls(tmp_path: Path) -> None:
    turn = {"role": "assistant", "tool_calls": [CALL]}
    assert from_row({"messages": [turn]}, None, "x").content == (Message("assistant", None, {"tool_calls": [CALL]}),)
    for bad in ({"role": "assistant"}, {"role": "assistant", "content": None}, {"role": "assistant", "tool_calls": []}):
        with pytest.raises(UPQError, match=r"message 1: (expected \{role, content\}|the content must be a text)"):
            from_row({"messages": [bad]}, None, "x")


def test_nulls_of_a_schema_are_no_keys(tmp_path: Path) -> None:
    rows = [calling(None)["messages"], talk()["messages"]]
    pq.write_table(pa.table({"messages": rows}), tmp_path / "a.parquet")
    first, second = contents(tmp_path / "a.parquet")
    assert [sorted(m.extra) for m in first] == [[], ["tool_calls"], ["tool_call_id"], []]
    assert second == contents(lines(tmp_path / "b.jsonl", talk()))[0]


# Columns, roles, content


def test_the_first_column_with_a_value_is_taken(tmp_path: Path) -> None:
    rows = [
        {"messages": None, "text": "a fox"},
        {**talk(), "text": None},
        {"messages": [], "text": "b"},
        {"text": None},
    ]
    read = contents(lines(tmp_path / "a.jsonl", *rows))
    assert [c if isinstance(c, str) else "talk" for c in read] == ["a fox", "talk", "b"]
    table = pa.table({name: [row.get(name) for row in rows] for name in ("text", "messages")})
    pq.write_table(table, tmp_path / "a.parquet")
    assert contents(tmp_path / "a.parquet") == read


@pytest.mark.parametrize("row", [{"text": None}, {"text": None, "messages": None}, {"text": ""}])
def test_a_file_of_nulls_holds_no_text(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(UPQError, match=r"a\.jsonl: no text in it"):
        contents(lines(tmp_path / "a.jsonl", row))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "developer", "content": "Be brief."},
        {"from": "developer", "value": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
    ],
)
def test_other_spellings_of_a_system_message(message: dict[str, Any]) -> None:
    assert from_row([message], None, "x").content == (Message("system", "Be brief."),)


@pytest.mark.parametrize("role", ["function_call", "observation"])
def test_other_roles_are_named_with_a_way_out(tmp_path: Path, role: str) -> None:
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": role, "value": "{}"}]}
    with pytest.raises(UPQError, match=rf"message 2: unknown role '{role}'; .*; --set data.on_bad_row=skip leaves"):
        pack(tmp_path, lines(tmp_path / "a.jsonl", row))


def test_messages_as_json_in_a_text_are_a_conversation(tmp_path: Path) -> None:
    expected = contents(lines(tmp_path / "a.jsonl", talk()))
    row = {"messages": json.dumps(talk()["messages"])}
    assert contents(lines(tmp_path / "b.jsonl", row)) == expected
    assert contents(lines(tmp_path / "b.jsonl", {"talk": row["messages"]}), field="talk") == expected
    for text in ("[1, 2]", "[a", json.dumps([])):
        assert contents(lines(tmp_path / "b.jsonl", {"messages": text})) == [text]
    assert contents(lines(tmp_path / "b.jsonl", {"text": row["messages"]})) == [row["messages"]]


# Layouts of files


def test_json_over_several_lines(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "one"}, indent=2))
        assert contents(tmp_path / name) == ["one"]
        (tmp_path / name).write_text("".join(json.dumps({"text": t}, indent=2) + "\n" for t in "ab"))
        assert contents(tmp_path / name) == ["a", "b"]
        (tmp_path / name).write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=2))
        assert contents(tmp_path / name) == ["one", "two"]


def test_lists_of_messages_are_conversations(tmp_path: Path) -> None:
    talks = [talk(n)["messages"] for n in range(3)]
    expected = contents(lines(tmp_path / "a.jsonl", *map(talk, range(3))))
    assert contents(lines(tmp_path / "b.jsonl", *talks)) == expected
    assert contents(lines(tmp_path / "b.json", *talks)) == expected
    (tmp_path / "c.json").write_text(json.dumps(talks))
    assert contents(tmp_path / "c.json") == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (talk()["messages"], r"item 1: a message where a row should be; a conversation is \{\"messages\": "),
        ({"data": [{"text": "a"}]}, r"a\.json:1: one object whose rows are in 'data'; write these rows one a line"),
        ({"talk": talk()["messages"]}, r"a\.json:1: no column .*; columns here: talk; set the source's `field`"),
    ],
)
def test_other_layouts_are_named_with_the_way_out(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(UPQError, match=message):
        contents(tmp_path / "a.json")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
def test_every_end_of_a_line(tmp_path: Path, end: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upq.data.sources._PIECE", piece)
    texts = [f"the {n}th" for n in range(20)]
    assert contents(lines(tmp_path / "a.jsonl", *({"text": t} for t in texts), end=end)) == texts
    (tmp_path / "a.txt").write_bytes((end + end).join(f"{t},{end}so" for t in texts).encode())
    assert contents(tmp_path / "a.txt", separator="blank_line") == [f"{t},{end}so" for t in texts]
    places = [d.where for d in read_documents(TextSource(path=str(tmp_path / "a.txt"), separator="blank_line"))]
    assert places[:3] == [f"{tmp_path / 'a.txt'}:{n}" for n in (1, 4, 7)]


def test_what_describes_a_data_set_is_not_its_text(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    lines(clone / "data" / "train.jsonl", *({"text": f"The {n}th fox went home."} for n in range(50)))
    for name in (
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        "dataset_infos.json",
        "clone.py",
        ".gitattributes",
        "CITATION.cff",
    ):
        (clone / name).write_text("about the data")
    assert len(contents(clone)) == 50
    _, notes = pack(tmp_path, clone)
    assert any("CITATION.cff, LICENSE, LICENSE.txt and 3 more describe the data and are left out" in n for n in notes)
    (clone / "notes.md").write_text("a text of its own")
    assert len(contents(clone)) == 51
    assert contents(clone / "README.md") == ["about the data"]  # where it is asked for by name


# Rows that cannot be used


def mixed(path: Path, bad: set[int], rows: int = 400) -> Path:
    return lines(path, *({"body": "x"} if n in bad else talk(n) for n in range(1, rows + 1)))


def test_a_late_bad_row_is_left_out_and_counted(tmp_path: Path) -> None:
    made, notes = pack(tmp_path, mixed(tmp_path / "a.jsonl", {101, 250}))
    assert (made.sources[0].rows, made.sources[0].bad_rows, made.sources[0].documents) == (400, 2, 398)
    (note,) = [note for note in notes if "cannot be used" in note]
    assert "2 of 400 rows cannot be used and are left out; the first: " in note
    assert "a.jsonl:101: no column" in note
    again, _ = pack(tmp_path, tmp_path / "a.jsonl")
    assert again.sources == made.sources


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({1}, r"a\.jsonl:1: no column .*; --set data\.on_bad_row=skip leaves such rows out$"),
        ({100}, r"a\.jsonl:100: no column .*; --set data\.on_bad_row=skip leaves such rows out$"),
        (
            {150, 160},
            r"a\.jsonl:160: .*; 2 of the first 160 rows cannot be used, more than 1 %; --set data\.on_bad_row",
        ),
    ],
)
def test_early_or_many_bad_rows_end_the_run(tmp_path: Path, bad: set[int], message: str) -> None:
    with pytest.raises(UPQError, match=message):
        pack(tmp_path, mixed(tmp_path / "a.jsonl", bad))


def test_error_and_skip_hold_for_every_row(tmp_path: Path) -> None:
    file = mixed(tmp_path / "a.jsonl", {1, 2, 3, 350})
    made, _ = pack(tmp_path, file, on_bad_row="skip")
    assert made.sources[0].bad_rows == 4
    with pytest.raises(UPQError, match=r"a\.jsonl:350: "):
        pack(tmp_path, mixed(tmp_path / "a.jsonl", {350}), on_bad_row="error")


def test_skipped_rows_leave_the_others_as_they_are(tmp_path: Path) -> None:
    file = lines(tmp_path / "good.jsonl", *(talk(n) for n in range(1, 401) if n not in (5, 350)))
    expected, _ = pack(tmp_path / "1", file)
    made, _ = pack(tmp_path / "2", mixed(tmp_path / "a.jsonl", {5, 350}), on_bad_row="skip")
    assert made.digest == expected.digest


def test_what_a_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    two = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    file = lines(tmp_path / "a.jsonl", *map(talk, range(200)), two)
    made, notes = pack(tmp_path, file, ALTERNATE)
    assert (made.sources[0].rows, made.sources[0].bad_rows, made.sources[0].documents) == (201, 1, 200)
    assert any("a.jsonl:201: the chat template refuses this conversation (roles must alternate)" in n for n in notes)
    with pytest.raises(UPQError, match=r"b\.jsonl:2: the chat template refuses .*; --set data.on_bad_row=skip"):
        pack(tmp_path, lines(tmp_path / "b.jsonl", talk(), two), ALTERNATE)


def test_a_broken_line_is_a_bad_row(tmp_path: Path) -> None:
    file = mixed(tmp_path / "a.jsonl", set())
    file.write_text(file.read_text() + '{"messages": [{"role": "us')  # as a writer that was killed leaves it
    assert pack(tmp_path, file)[0].sources[0].bad_rows == 1


@pytest.mark.parametrize("template", [PLAIN, ALTERNATE])
def test_nothing_but_bad_rows(tmp_path: Path, template: str) -> None:
    bad = {"body": "x"} if template == PLAIN else {"messages": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(
        UPQError, match=r"a\.jsonl: (no text in it; .*; 3 rows cannot|none of its 3 rows can) be used.*a\.jsonl:1"
    ):
        pack(tmp_path, lines(tmp_path / "a.jsonl", bad, bad, bad), template, on_bad_row="skip")


def test_a_source_without_a_token_is_named(tmp_path: Path) -> None:
    """Beside one with tokens it would be read again without end, alone it would be rows of special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({c: n for n, c in enumerate("abcdefghijklmnopqrstuvwxyz")}, []))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "letters.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    (tmp_path / "others.txt").write_text("日本語のテキストです。" * 200)
    for eos in (None, "</s>"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
        for names in (("letters", "others"), ("others",)):
            data = Data(sources=tuple(TextSource(path=f"{tmp_path / name}.txt") for name in names), seq_len=16)
            with pytest.raises(
                UPQError, match=r"others\.txt: the model's tokenizer has no token for anything in it; leave"
            ):
                prepare(data, tokenizer, tmp_path / "rows", sequences=10_000, seed=0)


def test_documents_know_their_rows(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}]
    tally = Tally(None)
    read = list(read_documents(TextSource(path=str(lines(tmp_path / "a.jsonl", *rows))), tally))
    where = str(tmp_path / "a.jsonl")
    assert read == [Document("a", f"{where}:1", 1), Document("b", f"{where}:3", 3)]
    assert (tally.rows, tally.bad) == (3, 0)

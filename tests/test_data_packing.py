"""Rows hold the documents end to end, validation has its own, and training goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tiny import byte_tokenizer
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.data import TokenSet, load_eval_text, prepare
from upq.data.config import Data, TextSource
from upq.data.tokens import permutation
from upq.files.tensors import TensorPlan

BOS, EOS = "<s>", "</s>"
TOKENIZER = byte_tokenizer(bos=BOS, eos=EOS)
SHARED = Path(__file__).parents[2] / "shared" / "data"
GOLDEN = ([1, 5, 6, 0, 2, 3, 7, 4], [7, 3, 0, 2, 1, 6, 4, 5], [4, 5, 0, 2, 7, 3, 1, 6])
CHATML = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '|' }}{% endfor %}"


class Watcher(Silent):
    def __init__(self) -> None:
        self.units = 0
        self.notes: list[str] = []

    def advance(self, units: int = 1, **figures: float) -> None:
        assert units > 0
        self.units += units

    def note(self, text: str) -> None:
        self.notes.append(text)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def numbered(n: int, word: str = "document") -> list[str]:
    return [f"{word} {i} " + "x" * (7 * i % 23) for i in range(n)]


def section(*paths: Path, weights: tuple[float, ...] = (), **options: Any) -> Data:
    sources = tuple(
        TextSource(path=str(p), weight=w) for p, w in zip(paths, weights or (1.0,) * len(paths), strict=True)
    )
    return Data(sources=sources, **({"seq_len": 32, "validation": 4} | options))


def pack(data: Data, path: Path, tokenizer: Any = TOKENIZER, **options: Any) -> TokenSet:
    return prepare(data, tokenizer, path, **({"sequences": 1000, "seed": 0} | options))


def text_of(rows: torch.Tensor, tokenizer: Any = TOKENIZER) -> str:
    return str(tokenizer.decode(rows.flatten().tolist()))


def whole(text: str) -> list[str]:
    """The documents that are complete in a text of rows."""
    return [piece.removeprefix(BOS) for piece in text.split(EOS)[:-1] if piece.startswith(BOS)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "corpus.jsonl", numbered(200))


# What is in the rows


def test_rows_are_the_documents_end_to_end(corpus: Path, tmp_path: Path) -> None:
    """Training and validation, each decoded, hold every document once, in order, between one BOS and one EOS."""
    made = pack(section(corpus), tmp_path / "set")
    rows = [text_of(made.tokens_NT), text_of(made.validation_tokens_NT)]
    texts = numbered(200)
    for text in rows:
        assert text.startswith(BOS)
        documents = whole(text)
        assert documents == [t for t in texts if t in documents]
        # Nothing but documents: what the last BOS opens is the beginning of one.
        *_, tail = text.split(EOS)
        assert "".join(BOS + d + EOS for d in documents) + tail == text
        assert any((BOS + t).startswith(tail) for t in texts)
    found = Counter(whole(rows[0]) + whole(rows[1]))
    assert set(found.values()) == {1}
    # The cut tail of each part, and of the last validation document what validation had no room for.
    assert sum(len(t) + 2 for t in texts) - sum(len(t) + 2 for t in found) < 5 * 32


def test_each_row_begins_with_the_bos_of_a_tokenizer_that_adds_it(corpus: Path, tmp_path: Path) -> None:
    """The rows are those of a tokenizer that adds none, but for their first token, which is no target."""
    plain, adding = byte_tokenizer(bos=BOS, eos=EOS), byte_tokenizer(bos=BOS, eos=EOS, adds_bos=True)
    without, made = (pack(section(corpus), tmp_path / str(n), t) for n, t in enumerate((plain, adding)))
    pairs = [
        (without.tokens_NT, made.tokens_NT),
        (without.validation_tokens_NT, made.validation_tokens_NT),
        tuple(load_eval_text(corpus, t, 16) for t in (plain, adding)),
    ]
    for before_NT, after_NT in pairs:
        assert not (before_NT[:, 0] == adding.bos_token_id).all()
        assert (after_NT[:, 0] == adding.bos_token_id).all()
        assert torch.equal(before_NT[:, 1:], after_NT[:, 1:])


def test_training_and_validation_share_no_document(corpus: Path, tmp_path: Path) -> None:
    made = pack(section(corpus), tmp_path / "set")
    assert len(made.validation_tokens_NT) == 4
    train, validation = (
        {int(piece.split()[1]) for piece in text_of(rows).split(BOS) if len(piece) > len("document 123 ")}
        for rows in (made.tokens_NT, made.validation_tokens_NT)
    )
    assert not train & validation
    assert len(validation) >= 4
    assert max(validation) - min(validation) > 50  # from all over the text


def test_repeated_text_is_not_on_both_sides(tmp_path: Path) -> None:
    texts = numbered(40)
    first, second = (write_lines(tmp_path / name, texts * 3) for name in ("a.jsonl", "b.jsonl"))
    made = pack(section(first, second), tmp_path / "set")
    held = set(whole(text_of(made.validation_tokens_NT)))
    assert held
    assert not held & set(whole(text_of(made.tokens_NT)))


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (None, EOS), (BOS, None), (BOS, EOS)])
def test_separators_are_those_the_tokenizer_has(tmp_path: Path, bos: str | None, eos: str | None) -> None:
    file = write_lines(tmp_path / "a.jsonl", ["one", "two", "three"])
    rows = load_eval_text(file, byte_tokenizer(bos=bos, eos=eos, adds_bos=bos is not None), 1000)
    expected = "".join((bos or "") + text + (eos or "") for text in ("one", "two", "three"))
    assert byte_tokenizer(bos=bos, eos=eos).decode(rows[0].tolist()) == expected


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 2.0, 5.0)])
def test_token_shares_follow_weights(tmp_path: Path, weights: tuple[float, ...]) -> None:
    """Whatever the documents' lengths, and at every point of the way."""
    files = [
        write_lines(tmp_path / f"{n}.jsonl", [f"{n}" * (5 + 40 * n + i % 7) for i in range(3000)])
        for n in range(len(weights))
    ]
    made = pack(section(*files, weights=weights), tmp_path / "set", sequences=500)
    total = sum(use.tokens for use in made.sources)
    for use, weight in zip(made.sources, weights, strict=True):
        assert use.tokens / total == pytest.approx(weight / sum(weights), abs=0.02)
    letters = Counter(text_of(made.tokens_NT[:100]))
    assert letters["1"] / (letters["0"] + letters["1"]) == pytest.approx(
        weights[1] / (weights[0] + weights[1]), abs=0.1
    )


def test_a_source_that_ends_is_read_again_while_others_go_on(tmp_path: Path) -> None:
    small = write_lines(tmp_path / "small.jsonl", numbered(20, "small"))
    large = write_lines(tmp_path / "large.jsonl", numbered(300, "large"))
    watcher = Watcher()
    made = pack(section(small, large), tmp_path / "set", progress=watcher)
    assert made.sources[0].documents > 20
    assert made.sources[1].documents == 300  # a single pass
    assert made.sources[0].tokens == pytest.approx(made.sources[1].tokens, rel=0.02)
    assert [note for note in watcher.notes if "small.jsonl is read again" in note] == [watcher.notes[0]]


def test_reading_stops_when_there_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read = 0

    def endless(*_: object, **__: object) -> Any:
        nonlocal read
        while True:
            read += 1
            yield {"text": f"document {read}"}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    made = prepare(Data(seq_len=32, validation=4), TOKENIZER, tmp_path / "set", sequences=20, seed=0)
    assert made.tokens_NT.shape == (20, 32)
    assert made.validation_tokens_NT.shape == (4, 32)
    assert read < 1000
    assert made.sources[0].identity == "hub:HuggingFaceFW/fineweb-edu/sample-10BT/train"


def test_few_rows_asked_of_much_text_still_hold_out_all(corpus: Path, tmp_path: Path) -> None:
    made = pack(section(corpus, validation=8), tmp_path / "set", sequences=2)
    assert (len(made.tokens_NT), len(made.validation_tokens_NT)) == (2, 8)


# Too little text


def test_fewer_rows_than_asked_are_told(corpus: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    made = pack(section(corpus), tmp_path / "set", progress=watcher)
    n = len(made.tokens_NT)
    assert f"data: the text makes {n} training sequences of 32 tokens, 1000 are asked for" in watcher.notes[0]
    assert watcher.units == 1004


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 50])
def test_at_least_half_of_the_rows_train(tmp_path: Path, rows: int) -> None:
    (tmp_path / "a.txt").write_text("y" * (32 * rows))
    watcher = Watcher()
    made = pack(section(tmp_path / "a.txt", validation=32), tmp_path / "set", progress=watcher)
    held = len(made.validation_tokens_NT)
    assert len(made.tokens_NT) + held == rows
    assert held == min(32, rows // 2)
    assert any("32 are asked for" in note for note in watcher.notes) == (held < 32)


def test_one_long_document_is_cut_and_told(tmp_path: Path) -> None:
    text = "".join(f"{n:07d} " for n in range(1000))
    (tmp_path / "a.txt").write_text(text)
    watcher = Watcher()
    made = pack(section(tmp_path / "a.txt"), tmp_path / "set", tokenizer=byte_tokenizer(), progress=watcher)
    assert any("too few documents to give validation its own" in note for note in watcher.notes)
    train, held = (text_of(rows).split() for rows in (made.tokens_NT, made.validation_tokens_NT))
    assert sorted(train + held) == text.split()  # every token once, on one side
    assert train == sorted(train)
    gaps = np.diff([0, *(int(row) for row in held[::4]), 1000])
    assert gaps.max() < 400  # spread over the text


def test_two_books_are_not_halved_for_a_few_rows(tmp_path: Path) -> None:
    """A document set aside takes more than validation needs: not where that costs much of the training."""
    file = write_lines(tmp_path / "a.jsonl", ["a" * 3200, "b" * 3200])
    made = pack(section(file), tmp_path / "set")
    assert len(made.tokens_NT) >= 190
    plenty = pack(section(file), tmp_path / "other", sequences=50)
    assert len(set(text_of(plenty.validation_tokens_NT)) & set(text_of(plenty.tokens_NT)) & set("ab")) == 0


def test_less_text_than_a_sequence(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", ["tiny"])
    with pytest.raises(UPQError, match=r"hold 6 tokens, less than one sequence of 32; give more text, or a data"):
        pack(section(file), tmp_path / "set")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


# Masks


def chats(path: Path, rows: int, silent: int = 0) -> Path:
    """Conversations; the first `silent` of them are without an assistant."""
    with path.open("w") as file:
        for n in range(rows):
            question = {"role": "user", "content": f"q{n}" * 20}
            answer = [] if n < silent else [{"role": "assistant", "content": f"A{n}" * 9}]
            file.write(json.dumps({"messages": [question, *answer]}) + "\n")
    return path


def test_mask_follows_its_tokens_into_the_rows(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos=BOS, eos=EOS, chat_template=CHATML)
    file = chats(tmp_path / "a.jsonl", 60)
    made = pack(section(file, loss_on="assistant"), tmp_path / "set", tokenizer)
    for rows, mask in ((made.tokens_NT, made.mask_NT), (made.validation_tokens_NT, made.validation_mask_NT)):
        assert mask is not None
        assert mask.dtype == torch.uint8
        on, off = (str(tokenizer.decode(rows[mask == value].tolist())) for value in (1, 0))
        assert set(on.replace(EOS, "")) <= set("A0123456789|")
        assert "A" not in off
    tokens_BT, mask_BT = made.batch(0, 5)
    assert mask_BT.dtype == torch.bool
    assert mask_BT.shape == tokens_BT.shape
    assert not mask_BT.all()


def test_rows_without_a_target_are_left_out(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    watcher = Watcher()
    data = section(chats(tmp_path / "a.jsonl", 60, silent=30), loss_on="assistant")
    made = pack(data, tmp_path / "set", tokenizer, progress=watcher)
    assert made.mask_NT is not None
    assert made.mask_NT[:, 1:].any(1).all()
    assert any("sequences without a token of the assistant are left out" in note for note in watcher.notes)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    data = section(chats(tmp_path / "a.jsonl", 20, silent=20), loss_on="assistant")
    with pytest.raises(UPQError, match=r"no sequence holds a token of the assistant; set data\.loss_on=all"):
        pack(data, tmp_path / "set", byte_tokenizer(chat_template=CHATML))


def test_no_mask_is_all_true(corpus: Path, tmp_path: Path) -> None:
    made = pack(section(corpus), tmp_path / "set")
    assert made.mask_NT is None
    assert set(load_file(tmp_path / "set")) == {"tokens", "validation_tokens"}
    assert made.batch(0, 3)[1].all()


# Order


@given(n=st.integers(1, 300), seed=st.integers(-5, 2**65), epoch=st.integers(0, 50))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(n, seed, epoch).tolist()) == list(range(n))


def test_the_order_is_a_promise() -> None:
    """Runs resume with it, so it must not change between versions or machines."""
    assert permutation(8, 0, 0).tolist() == GOLDEN[0]
    assert permutation(8, 1, 0).tolist() == GOLDEN[1]
    assert permutation(8, 0, 1).tolist() == GOLDEN[2]


def test_orders_are_uniform() -> None:
    """Each row is first about equally often, over seeds and over epochs."""
    for orders in ([permutation(8, seed, 0) for seed in range(800)], [permutation(8, 0, e) for e in range(800)]):
        counts = np.bincount([order[0] for order in orders], minlength=8)
        assert counts.min() > 60
        assert counts.max() < 145


@pytest.mark.parametrize("size", [1, 3, 7])
def test_every_row_once_an_epoch(corpus: Path, tmp_path: Path, size: int) -> None:
    made = pack(section(corpus), tmp_path / "set")
    n = len(made.tokens_NT)
    stream = torch.cat([made.batch(step, size)[0] for step in range(-(-2 * n // size))])
    epochs = [sorted(map(tuple, stream[e * n : (e + 1) * n].tolist())) for e in (0, 1)]
    assert epochs[0] == epochs[1] == sorted(map(tuple, made.tokens_NT.tolist()))
    assert not torch.equal(stream[:n], stream[n : 2 * n])


def test_a_restart_gives_the_same_batches(corpus: Path, tmp_path: Path) -> None:
    made = pack(section(corpus), tmp_path / "set", seed=3)
    again = pack(section(corpus), tmp_path / "set", seed=3)
    elsewhere = pack(section(corpus), tmp_path / "elsewhere", seed=3)
    for step in (0, 1, 77):
        assert torch.equal(made.batch(step, 4)[0], again.batch(step, 4)[0])
        assert torch.equal(made.batch(step, 4)[0], elsewhere.batch(step, 4)[0])
    assert made.digest == again.digest == elsewhere.digest
    assert made.batch(0, 4)[0].dtype == torch.int64


def test_another_seed_is_another_order_and_another_validation(corpus: Path, tmp_path: Path) -> None:
    one, other = (pack(section(corpus), tmp_path / f"{seed}", seed=seed) for seed in (0, 1))
    assert not torch.equal(one.batch(0, 8)[0], other.batch(0, 8)[0])
    assert not torch.equal(one.validation_tokens_NT, other.validation_tokens_NT)


def test_calibration_is_the_beginning_of_the_first_epoch(corpus: Path, tmp_path: Path) -> None:
    made = pack(section(corpus), tmp_path / "set")
    assert torch.equal(made.calibration(6), made.batch(0, 6)[0])
    assert len(made.calibration(10**6)) == len(made.tokens_NT)


# The file


def test_the_file_is_plain_safetensors(corpus: Path, tmp_path: Path) -> None:
    made = pack(section(corpus), tmp_path / "deep" / "set.safetensors")
    raw = load_file(tmp_path / "deep" / "set.safetensors")
    assert raw["tokens"].dtype == torch.int32
    assert torch.equal(raw["tokens"], made.tokens_NT)
    content = raw["tokens"].numpy().tobytes() + raw["validation_tokens"].numpy().tobytes()
    assert made.digest == hashlib.sha256(content).hexdigest()
    (use,) = made.sources
    assert (use.path, use.documents) == (str(corpus), 200)
    assert use.identity == "sha256:" + hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert use.tokens == sum(len(text) + 2 for text in numbered(200))
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "deep" / "set.safetensors").stat().st_mode) == 0o666 & ~umask
    assert os.listdir(tmp_path / "deep") == ["set.safetensors"]


CHANGES: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "content": lambda corpus, options: write_lines(corpus, numbered(201)) and options,
    "seed": lambda _, options: options | {"seed": 1},
    "sequences": lambda _, options: options | {"sequences": 10},
    "seq_len": lambda corpus, options: options | {"data": section(corpus, seq_len=16)},
    "tokenizer": lambda _, options: options | {"tokenizer": byte_tokenizer(eos=EOS)},
    "template": lambda _, options: options | {"tokenizer": byte_tokenizer(bos=BOS, eos=EOS, chat_template=CHATML)},
}


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_a_set_is_made_again_only_when_something_changed(corpus: Path, tmp_path: Path, change: str | None) -> None:
    options: dict[str, Any] = {"data": section(corpus), "path": tmp_path / "set"}
    pack(**options)
    before = (tmp_path / "set").stat()
    options = CHANGES[change](corpus, options) if change else options
    watcher = Watcher()
    made = pack(**options, progress=watcher)
    after = (tmp_path / "set").stat()
    assert (before.st_ino == after.st_ino) == (change is None)
    assert watcher.notes[0].endswith("is up to date" if change is None else "is made anew")
    assert watcher.units == options.get("sequences", 1000) + 4
    assert len(made.tokens_NT)


def test_a_file_that_is_no_set_is_made_anew(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "set").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    assert len(pack(section(corpus), tmp_path / "set").tokens_NT)


@pytest.mark.parametrize("at", ["documents", "rows", "replace"])
def test_killed_on_the_way_leaves_nothing(
    corpus: Path, tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was there before is still there."""
    pack(section(corpus), tmp_path / "old")
    content = (tmp_path / "old").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    if at == "documents":
        lines = corpus.read_text().splitlines()
        corpus.write_text("\n".join([*lines, *["{broken"] * 9]))
    elif at == "rows":
        monkeypatch.setattr(TensorPlan, "pieces", killed)
    else:
        monkeypatch.setattr(Path, "replace", killed)
    for name in ("old", "new"):
        with pytest.raises((KeyboardInterrupt, UPQError)):
            pack(section(corpus), tmp_path / name, seed=9)
    assert sorted(os.listdir(tmp_path)) == ["corpus.jsonl", "old"]
    assert (tmp_path / "old").read_bytes() == content


# Text for perplexity


def test_eval_text_is_whole_rows_without_the_tail(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789")
    rows = load_eval_text(tmp_path / "a.txt", byte_tokenizer(), 4)
    assert rows.dtype == torch.int64
    assert text_of(rows, byte_tokenizer()) == "01234567"
    assert rows.shape == (2, 4)


def test_eval_text_leaves_nothing_out(tmp_path: Path) -> None:
    """Its error names no key of a recipe, for there is none."""
    (tmp_path / "a.jsonl").write_text('{"text": "a good row"}\n' * 300 + "{broken\n")
    with pytest.raises(UPQError, match=r"a\.jsonl:301: invalid JSON .*each line must hold one whole object$"):
        load_eval_text(tmp_path / "a.jsonl", byte_tokenizer(), 4)


def test_eval_text_by_blocks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    rows = load_eval_text(tmp_path / "a.txt", TOKENIZER, 100, separator="blank_line")
    assert text_of(rows) == "<s>one</s><s>two</s>"


def test_short_eval_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    assert load_eval_text(tmp_path / "a.txt", byte_tokenizer(), 4).shape == (1, 2)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UPQError, match=r"a\.txt: 1 token is too little to measure perplexity on; give a longer text"):
        load_eval_text(tmp_path / "a.txt", byte_tokenizer(), 4)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data beside the repository")
def test_real_text_with_a_real_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    stories = SHARED / "text" / "tinystories_heldout.txt"
    source = TextSource(path=str(stories), separator="blank_line")
    made = pack(Data(sources=(source,), seq_len=1024, validation=1), tmp_path / "set", tokenizer, sequences=8)
    assert (made.tokens_NT.shape, made.validation_tokens_NT.shape) == ((8, 1024), (1, 1024))
    blocks = [block.strip("\n") for block in stories.read_text().split("\n\n")]
    originals = {" ".join(block.split()) for block in blocks}
    inner = [d for row in made.tokens_NT for d in text_of(row[None], tokenizer).split("</s>")[1:-1]]
    assert inner
    assert all(" ".join(d.replace("<s>", "").split()) in originals for d in inner)

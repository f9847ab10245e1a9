"""What the template writes, which tokens are the assistant's, and one BOS and EOS a document."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tiny import byte_tokenizer
from upq.core.errors import UPQError
from upq.data.config import TextSource
from upq.data.encoding import Encoded, Encoder
from upq.data.rows import Document, Message
from upq.data.sources import read_documents

SHARED = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data beside the repository")

CHAT = (
    Message("user", "Who? Me? Fine."),
    Message("assistant", "Fine.\n\nMe? Zoë!"),
    Message("user", "Fine."),
    Message("assistant", "Fine."),
)
ANSWERS = [m.content for m in CHAT if m.role == "assistant"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_PROMPT = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ '\n\n' + m.role + ': ' + (m.content | trim) }}{% endfor %}"
LINES = "{% for m in messages %}{{ m.role + ': ' + (m.content | trim) + '\n' }}{% endfor %}"
CHANGING = "{% for m in messages %}{{ '#' + m.content.replace('\n\n', '\n') + '<|im_end|>' }}{% endfor %}"
# Earlier answers lose their thoughts and the last one gets some, as Qwen3 writes them.
THINKING = (
    "{% for m in messages %}{% set c = m.content.split('</think>')[-1] %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{% set t = m.content.split('</think>')[0] if '</think>' in m.content"
    " else '<think>\n\n' %}{{ t + '</think>' }}{% endif %}{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def encode(tokenizer: Any, messages: tuple[Message, ...] = CHAT, **options: Any) -> Encoded:
    return Encoder(tokenizer, options.get("loss_on", "assistant")).encode([Document(messages, "file:7")])[0]


def marked_texts(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The runs of tokens under the mask, decoded."""
    assert encoded.mask_L is not None
    pairs = zip(encoded.tokens_L.tolist(), encoded.mask_L.tolist(), strict=True)
    runs: Iterator[Any] = (list(run) for on, run in groupby(pairs, key=lambda pair: pair[1]) if on)
    return [tokenizer.decode([token for token, _ in run]) for run in runs]


@pytest.mark.parametrize(
    ("template", "ends", "eos"),
    [
        (CHATML, ["<|im_end|>", "<|im_end|>"], "<|im_end|>"),
        (CHATML, ["<|im_end|>", "<|im_end|>"], "<|endoftext|>"),
        (MARKED, ["<|im_end|>", "<|im_end|>"], "<|im_end|>"),
        (NO_PROMPT, ["</s>", "</s>"], "</s>"),
        (LLAMA2, [" </s>", " </s>"], "</s>"),
        (BARE, ["", "</s>"], "</s>"),
        (BARE, ["", ""], None),
        (LINES, ["\n", "\n</s>"], "</s>"),
    ],
)
def test_the_mask_is_the_assistants_words_and_end_of_turn(template: str, ends: list[str], eos: str | None) -> None:
    tokenizer = byte_tokenizer(bos="<s>", eos=eos, chat_template=template)
    texts = marked_texts(tokenizer, encode(tokenizer))
    assert texts == [answer + end for answer, end in zip(ANSWERS, ends, strict=True)]


@pytest.mark.parametrize("template", [CHATML, MARKED, NO_PROMPT, LLAMA2, BARE, LINES])
def test_nothing_ends_an_answer_that_was_cut_off(template: str) -> None:
    """Its tokens and its mask are those of the whole conversation up to the last word."""
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>", chat_template=template)
    cut = (*CHAT[:-1], Message("assistant", ANSWERS[-1], {"cut": True}))
    found, whole = encode(tokenizer, cut), encode(tokenizer)
    length = len(found.tokens_L)
    assert length < len(whole.tokens_L)
    assert found.tokens_L.tolist() == whole.tokens_L[:length].tolist()
    assert tokenizer.decode(found.tokens_L).endswith(str(ANSWERS[-1]))
    assert found.mask_L is not None
    assert whole.mask_L is not None
    assert found.mask_L.tolist() == whole.mask_L[:length].tolist()
    assert encode(tokenizer, cut, loss_on="all").tokens_L.tolist() == found.tokens_L.tolist()


def test_a_template_that_changes_the_words() -> None:
    tokenizer = byte_tokenizer(chat_template=CHANGING)
    assert marked_texts(tokenizer, encode(tokenizer)) == ["Fine.\nMe? Zoë!<|im_end|>", "Fine.<|im_end|>"]


def test_thoughts_are_the_assistants() -> None:
    tokenizer = byte_tokenizer(eos="<|im_end|>", chat_template=THINKING)
    chat = (*CHAT[:3], Message("assistant", "<think>\nhm\n</think>\n\nFine."))
    texts = marked_texts(tokenizer, encode(tokenizer, chat))
    assert texts == [ANSWERS[0] + "<|im_end|>", "<think>\nhm\n</think>\n\nFine.<|im_end|>"]


def test_a_conversation_without_an_assistant_has_no_target() -> None:
    tokenizer = byte_tokenizer(eos="</s>", chat_template=CHATML)
    mask = encode(tokenizer, CHAT[:1]).mask_L
    assert mask is not None
    assert not mask.any()


def test_the_tokens_do_not_depend_on_what_is_trained() -> None:
    for template in (CHATML, LLAMA2, MARKED):
        tokenizer = byte_tokenizer(bos="<s>", eos="</s>", chat_template=template)
        assert encode(tokenizer).tokens_L.tolist() == encode(tokenizer, loss_on="all").tokens_L.tolist()


@pytest.mark.parametrize("bos", [None, "<s>"])
@pytest.mark.parametrize("eos", [None, "</s>"])
@pytest.mark.parametrize("template", [CHATML, LLAMA2, BARE])
def test_a_conversation_has_one_bos_in_front_and_one_eos_behind(
    bos: str | None, eos: str | None, template: str
) -> None:
    if template == LLAMA2 and None in (bos, eos):
        pytest.skip("the template writes both")
    tokenizer = byte_tokenizer(bos=bos, eos=eos, chat_template=template)
    text = tokenizer.decode(encode(tokenizer, CHAT[:2]).tokens_L.tolist())
    assert text.startswith(bos or "")
    assert text.endswith(eos or "")
    assert text.count("<s>") == (bos is not None)
    assert text.count("</s>") == (eos is not None)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (None, None, "text"),
        (None, "</s>", "text</s>"),
        ("<s>", None, "<s>text"),
        ("<s>", "</s>", "<s>text</s>"),
        ("<|e|>", "<|e|>", "text<|e|>"),
    ],
)
def test_a_text_has_one_of_each(bos: str | None, eos: str | None, expected: str, adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos, eos=eos, adds_bos=adds_bos and bos is not None)
    (encoded,) = Encoder(tokenizer).encode([Document("text", "x")])
    assert tokenizer.decode(encoded.tokens_L.tolist()) == expected
    assert encoded.mask_L is None


def test_a_tokenizer_without_template() -> None:
    for loss_on in ("all", "assistant"):
        with pytest.raises(UPQError, match=r"file:7: .*has no chat template; quantize an instruction-tuned model"):
            encode(byte_tokenizer(), loss_on=loss_on)


def test_plain_text_has_no_assistant() -> None:
    with pytest.raises(UPQError, match=r"file:1: plain text has no assistant.*data\.loss_on=all"):
        Encoder(byte_tokenizer(), "assistant").encode([Document("hello", "file:1")])


def test_a_template_that_refuses() -> None:
    template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(UPQError, match=r"file:7: the chat template refuses .*\(roles must alternate\); mend or remove"):
        encode(byte_tokenizer(chat_template=template), loss_on="all")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role + m.content | upper + m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | length }}{% endfor %}",
        "{{ messages[-1].content }}{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_hides_the_assistant(template: str) -> None:
    with pytest.raises(UPQError, match=r"file:7: message \d: the chat template hides .*data\.loss_on=all"):
        encode(byte_tokenizer(chat_template=template))


@lru_cache
def real_tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(SHARED / name)


REAL = sorted((SHARED / "chat_templates").glob("*.jinja")) if SHARED.is_dir() else []


@needs_shared
@pytest.mark.parametrize("as_written", [True, False], ids=["raw", "flat"])
@pytest.mark.parametrize("file", REAL, ids=[f.stem for f in REAL])
def test_real_templates(file: Path, as_written: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, and with the line breaks and indents taken out that are there for the reader."""
    tokenizer = real_tokenizer("smollm2-135m-instruct")
    template = file.read_text()
    flat = template.replace("    ", "").replace("\n", "")
    monkeypatch.setattr(tokenizer, "chat_template", template if as_written else flat)
    texts = marked_texts(tokenizer, encode(tokenizer))
    words = [answer.replace("\n\n", "\n") if "falcon" in file.name else answer for answer in ANSWERS]
    assert len(texts) == len(words)
    for text, answer in zip(texts, words, strict=True):
        assert text.strip().startswith(answer)
        # Behind it a mark of the end of the turn at most, never the next turn's header ("<" may be part of a token).
        assert not any(header in text[len(answer) :].lower() for header in ("user", "human", "inst]", "instruction"))


@needs_shared
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-0.5b-instruct"])
def test_real_tokenizers_on_real_conversations(name: str) -> None:
    tokenizer = real_tokenizer(name)
    stream = read_documents(TextSource(path=str(SHARED.parent / "instruct" / "chats.jsonl")))
    documents = [next(stream) for _ in range(64)]
    for document, encoded in zip(documents, Encoder(tokenizer, "assistant").encode(documents), strict=True):
        assert isinstance(document.content, tuple)
        answers = [m.content + "<|im_end|>" for m in document.content if m.role == "assistant"]
        assert marked_texts(tokenizer, encoded) == answers
        rendered = Encoder(tokenizer).template.render(document.content, document.where)
        assert tokenizer.decode(encoded.tokens_L.tolist()) == rendered

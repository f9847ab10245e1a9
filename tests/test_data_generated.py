"""Conversations that a model writes itself: whole ones only, the same after an interruption, and part of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tiny import byte_tokenizer
from upq.artifact import read_manifest
from upq.data.generated import sample, write_conversations
from upq.errors import UPQError
from upq.pipeline import quantize
from upq.progress import Silent
from upq.recipe import Generated, Recipe, Source

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
TOKENIZER = byte_tokenizer(bos="<s>", eos="</s>", chat_template=TEMPLATE)
SECTION = Generated(tokens=600, max_new_tokens=40, batch_size=4)


def tiny(end: float) -> PreTrainedModel:
    """A random model in which the end token has `end` times the usual weight in every place."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        initializer_range=1e-3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # constant input to the head: the same distribution everywhere
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[TOKENIZER.eos_token_id] = torch.tensor(end).log() / 32
        model.lm_head.weight[TOKENIZER.bos_token_id] = -10.0
    return model


def total_of(work: Path) -> int:
    (folder,) = work.glob("generated-*")
    talks = [json.loads(line)["messages"] for text in read(folder).values() for line in text.splitlines()]
    return sum(len(TOKENIZER.apply_chat_template(talk, return_dict=True)["input_ids"]) for talk in talks)


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_a_batch_that_is_there_stays_and_the_rest_is_the_same(tmp_path: Path) -> None:
    model = tiny(20)
    first = read(write_conversations(tmp_path / "a", model, TOKENIZER, SECTION, seed=1, progress=Silent()))
    assert len(first) > 1
    (tmp_path / "b").mkdir()
    name = min(first)
    (tmp_path / "b" / name).write_text(first[name])
    torch.manual_seed(99)  # the caller's random state has no say
    again = read(write_conversations(tmp_path / "b", model, TOKENIZER, SECTION, seed=1, progress=Silent()))
    assert again == first
    assert read(write_conversations(tmp_path / "c", model, TOKENIZER, SECTION, seed=2, progress=Silent())) != first


def test_conversations_are_whole_and_as_many_as_asked_for(tmp_path: Path) -> None:
    class Counting(Silent):
        units = 0

        def advance(self, units: int = 1, **figures: float) -> None:
            self.units += units

    progress = Counting()
    folder = write_conversations(tmp_path / "a", tiny(20), TOKENIZER, SECTION, seed=1, progress=progress)
    talks = [json.loads(line)["messages"] for text in read(folder).values() for line in text.splitlines()]
    assert [[m["role"] for m in talk] for talk in talks] == [["user", "assistant"]] * len(talks)
    assert all(m["content"] and "</s>" not in m["content"] and len(m["content"]) <= 40 for talk in talks for m in talk)
    assert sum(len(TOKENIZER.apply_chat_template(talk, return_dict=True)["input_ids"]) for talk in talks) >= 600
    assert progress.units == 600


def test_samples_follow_the_models_own_distribution() -> None:
    """With the end token at weight 20 among 257 others of weight 1, an answer is empty with probability 20/277."""
    answers = sample(tiny(20), TOKENIZER, [[5, 6]] * 4000, 1)
    assert set(answers) == {""}  # one token: the end, or cut off
    lengths = [len(a) for a in sample(tiny(20), TOKENIZER, [[5, 6, 7], [5]] * 1000, 200) if a]
    assert sum(lengths) / len(lengths) == pytest.approx(276 / 20, rel=0.15)  # geometric, without the empty ones


@pytest.mark.parametrize(
    ("end", "tokenizer", "words"),
    [(1e-9, TOKENIZER, "ends none of its answers"), (20, byte_tokenizer(eos="</s>"), "no chat template")],
)
def test_a_model_that_cannot_is_one_line(tmp_path: Path, end: float, tokenizer: object, words: str) -> None:
    with pytest.raises(UPQError, match=words) as raised:
        write_conversations(tmp_path / "a", tiny(end), tokenizer, SECTION, seed=1, progress=Silent())  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("tokens", "least"), [("800", 800), ("null", 0)])
def test_a_run_learns_from_what_its_model_wrote(tmp_path: Path, tokens: str, least: int) -> None:
    torch.manual_seed(0)
    tiny(20).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Story {i}: the {i}th fox saw {i * 7} geese." for i in range(300)))
    recipe = Recipe.load(
        "paper",
        [
            *("data.seq_len=32", "data.validation=4", "int4=null", "int2.samples=20", "distill.tokens=0"),
            f"data.generated={{tokens: {tokens}, max_new_tokens: 40, batch_size: 8, weight: 3}}",
        ],
    )
    recipe = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(
                update={"sources": (Source(path=str(tmp_path / "text.txt"), separator="blank_line"),)}
            )
        }
    )
    quantize(tmp_path / "model", recipe, tmp_path / "out", keep_work=True)
    text, written = read_manifest(tmp_path / "out").data[:2]
    assert written["tokens"] > text["tokens"]
    # 20 rows to calibrate with and 4 held out, of 32 tokens each, three quarters written; and the batch that ends it.
    wanted = max(least, 24 * 32 * 3 // 4)
    assert wanted <= total_of(tmp_path / "out" / ".work") < wanted + 8 * 90
    (folder,) = (tmp_path / "out" / ".work").glob("generated-*")
    assert str(folder) == written["path"]


def test_a_missing_file_shows_before_anything_is_written(tmp_path: Path) -> None:
    tiny(20).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    recipe = Recipe.load("paper", ["data.generated={tokens: 800}", "data.seq_len=32"])
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": (Source(path="no.txt"),)})})
    with pytest.raises(UPQError, match="no such file"):
        quantize(tmp_path / "model", recipe, tmp_path / "out")
    assert not list((tmp_path / "out" / ".work").glob("generated-*"))

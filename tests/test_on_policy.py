"""On-policy training: what the student writes, on which prompts, and that a killed run is one that was never killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import upq.stages._answers
from tiny import CHAT, byte_tokenizer, tiny_model
from upq.artifact.manifest import read_manifest
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.core.scheme import QuantScheme
from upq.data.config import Data, TextSource
from upq.data.prompts import prompts, questions
from upq.decoding import Unsuitable
from upq.distill.student import frozen, make_student
from upq.files.metrics import METRICS, read_metrics
from upq.grids import GRIDS
from upq.model.matrices import Matrix
from upq.model.source import Source
from upq.nn.blocks import model_weights
from upq.nn.fake_quant import Solution
from upq.nn.fixed_codes import Start
from upq.run.recipe import Recipe
from upq.run.run import quantize
from upq.stages._answers import Round
from upq.stages.on_policy import OnPolicy
from victim import Victim, make_victim

TOKENIZER = byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT)
NONE_HELD = torch.zeros((0, 8), dtype=torch.int32)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return make_victim(tmp_path_factory.mktemp("victim"))


def recipe(victim: Victim, **changes: Any) -> Recipe:
    """Seven steps in rounds of three; the fourth and the last do not write."""
    settings = {
        "steps": 7, "refresh": 3, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "scale_lr": 1e-3,
        "prompt_tokens": 16, "max_new_tokens": 24, "written_at_once": 5, "off_policy": 0.3, "train_norms": True,
        "checkpoint_every": 2,
    }  # fmt: skip
    data = {**victim.recipe().data.model_dump(mode="json"), "seq_len": 32, "validation": 4}
    stages = {
        "int2": {"stage": "blockwise", "bits": 2, "method": "rtn"},
        "on_policy": {**settings, **changes},
    }
    return Recipe.of({"data": data, "stages": stages}, "here")


@pytest.fixture(scope="module")
def finished(victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its work kept."""
    out = tmp_path_factory.mktemp("finished") / "out"
    quantize(victim.model, recipe(victim), out, keep_work=True)
    return out


def rounds(out: Path) -> list[Round]:
    return [Round.read(path) for path in sorted((out / ".work" / "on_policy" / "answers").iterdir())]


def steps(out: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_metrics(out / METRICS) if line["kind"] == "step"]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


# ---- the rows


def test_a_batch_has_its_texts_and_its_targets_are_the_answers() -> None:
    found = Round.of([((1, 2), [3, 4, 5], False, False), ((6,), [7], True, True), ((8, 9, 10), [11], False, False)])
    tokens_BT, mask_BT = found.batch(slice(0, 2))
    assert tokens_BT.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert mask_BT.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert found.batch(slice(2, 3))[0].tolist() == [[8, 9, 10, 11]]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.99])
def test_the_share_of_steps_on_text_is_met(share: float) -> None:
    stage = OnPolicy(steps=100, scale_lr=1e-3, off_policy=share)
    read = [step for step in range(100) if stage.reads_text(step)]
    assert len(read) == round(100 * share) == stage.steps_off(100)
    assert [stage.steps_off(step) for step in read] == list(range(len(read)))


def test_a_round_is_what_its_steps_read(finished: Path) -> None:
    """Answers of the student alone, each behind a prompt of the text, up to the end or the limit."""
    found, end = rounds(finished), TOKENIZER.eos_token_id
    assert [len(each.answers) for each in found] == [12, 8]  # steps 0 to 2; of 3 to 6, those that write; 6 reads text
    text = TOKENIZER.decode(torch.cat([each.tokens for each in found]).tolist())
    assert "fox" in text or "Story" in text
    for each in found:
        tokens_BT, mask_BT = each.batch(slice(None))
        for ids, mask, cut in zip(tokens_BT, mask_BT, each.at_limit, strict=True):
            answer = ids[mask].tolist()
            assert (answer[-1] != end) == bool(cut)
            assert end not in answer[:-1]
            assert len(answer) == 24 or not cut


def test_figures_are_those_of_the_rows(finished: Path) -> None:
    """Tokens of a step are its rows'; shares stand beside the loss, and in the manifest."""
    lines, found = steps(finished), rounds(finished)
    own = [line for line in lines if "at_limit" in line]
    assert [line["step"] for line in lines if "at_limit" not in line] == [3, 6]
    cut = torch.cat([each.at_limit for each in found]).view(-1, 4).float().mean(1)
    assert [line["at_limit"] for line in own] == pytest.approx(cut.tolist())
    assert lines[-1]["tokens"] == sum(int(each.lengths.sum()) for each in found) + 2 * 4 * 32
    assert all(line["loss"] > 0 for line in lines)
    figures = read_manifest(finished).answers["on_policy"]
    assert figures["written"] == 20
    assert figures["at_limit"] == pytest.approx(float(cut.mean()))
    assert figures["at_limit_last"] == pytest.approx(float(found[-1].at_limit.float().mean()))


@pytest.mark.parametrize(
    ("family", "shape"),
    [("qwen2", {}), ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16})],
)
def test_the_student_that_writes_computes_what_the_student_does(family: str, shape: dict[str, Any]) -> None:
    model = tiny_model(family, **shape)
    scheme, starts = QuantScheme(bits=2), dict[str, Start]()
    for path, matrix in model_weights(model).items():
        assert isinstance(matrix, Matrix)
        weight = matrix.flat(model.get_parameter(path if matrix.experts else f"{path}.weight").detach())
        starts[path] = Solution(weight, GRIDS.get("seq").init(weight, scheme), scheme)
    student, tokens_BT = make_student(model, starts, train_norms=True), torch.arange(12).view(2, 6)
    written = frozen(student)
    assert {type(m) for m in written.modules()} == {type(m) for m in model.modules()}
    torch.testing.assert_close(written(tokens_BT).logits, student(tokens_BT).logits)
    assert not torch.allclose(written(tokens_BT).logits, model(tokens_BT).logits)
    assert written.get_input_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


# ---- the run


class EndsAfter(Silent):
    """Interrupts a run after so many steps of its on-policy stage."""

    def __init__(self, steps: int) -> None:
        self._left, self._at = steps, ""

    def start(self, stage: str, *, done: int = 0) -> None:
        self._at = stage

    def advance(self, n: int = 1, **figures: float) -> None:
        if self._at == "on_policy":
            self._left -= n
            if not self._left:
                raise KeyboardInterrupt


@pytest.mark.parametrize("killed_after", [1, 4])
def test_killed_and_run_again_is_never_killed(
    victim: Victim, finished: Path, tmp_path: Path, killed_after: int
) -> None:
    """In the first round before its first checkpoint, and in the second round at one."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(victim.model, recipe(victim), out, progress=EndsAfter(killed_after))
    if killed_after == 4:  # what was written after the last checkpoint may be lost too
        (out / ".work" / "on_policy" / "answers" / "000001.safetensors").unlink()
    quantize(victim.model, recipe(victim), out, keep_work=True)
    assert weights(out) == weights(finished)
    assert steps(out) == steps(finished)
    assert read_manifest(out).answers == read_manifest(finished).answers


def test_transformers_writes_what_the_compiled_decoder_would(
    victim: Victim, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding, which here changes no token."""

    def unsuitable(model: Any, *, size: int) -> Any:
        raise Unsuitable("the test says so")

    monkeypatch.setattr(upq.stages._answers, "batch", unsuitable)
    out = tmp_path / "out"
    quantize(victim.model, recipe(victim), out, keep_work=True)
    for mine, theirs in zip(rounds(out), rounds(finished), strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert torch.equal(mine.at_limit, theirs.at_limit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "cached"}, r"on_policy\.teacher=cached holds.*set on_policy\.teacher=offloaded"),
        ({"loss": "ce"}, r"on_policy\.loss=ce would teach the student what it writes"),
        ({"max_new_tokens": 120}, r"prompt_tokens=16 and max_new_tokens=120 are more than the model's context of 128"),
        ({"off_policy_loss": "cakld"}, r"on_policy\.off_policy_loss cakld: needs a confidence here"),
    ],
)
def test_a_wrong_setting_is_one_line(victim: Victim, changes: dict[str, Any], message: str) -> None:
    stages = recipe(victim, **changes).stages
    with pytest.raises(UPQError, match=message) as caught:
        stages["on_policy"].check("on_policy", Source(victim.model), Data())
    assert "\n" not in str(caught.value)


# ---- prompts


def lines(path: Path, rows: list[dict[str, Any]]) -> TextSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSource(path=str(path))


def talk(question: str) -> dict[str, Any]:
    turns = [("user", question), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "So.")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def of(sources: list[TextSource], held: torch.Tensor = NONE_HELD, **options: Any) -> list[str]:
    section = Data(sources=tuple(sources), seq_len=16)
    found = prompts(section, (), TOKENIZER, held, **{"count": 4, "longest": 40, "name": "here", **options})
    return [TOKENIZER.decode(ids) for ids in found]


def test_prompts_are_questions_and_beginnings_by_weight(tmp_path: Path) -> None:
    """Half of what is left of a text, one for each 16 tokens; no prompt twice; too long ones not at all."""
    talks = lines(
        tmp_path / "talks.jsonl", [talk("Is it?"), talk("Is it?"), talk("x" * 60), talk("Was it?"), talk("No?")]
    )
    asked = ["<|user|>Is it?<|assistant|>", "<|user|>Was it?<|assistant|>", "<|user|>No?<|assistant|>"]
    assert of([talks]) == asked
    text = lines(tmp_path / "text.jsonl", [{"text": "abcdefghijklmnopqrstuvwxyz"}])
    assert of([text], longest=5) == ["<s>abcd", "pqrst"]
    assert of([talks, text.model_copy(update={"weight": 3.0})], count=4, longest=30)[:2] == [
        asked[0],
        "<s>abcdefghijklm",
    ]


def test_a_held_out_prompt_is_left_out(tmp_path: Path) -> None:
    talks = lines(tmp_path / "talks.jsonl", [talk("Is it?"), talk("Was it?")])
    held = torch.tensor([TOKENIZER("</s><|user|>Is it?<|assistant|>Yes.")["input_ids"]], dtype=torch.int32)
    assert of([talks], held) == ["<|user|>Was it?<|assistant|>"]
    with pytest.raises(UPQError, match=r"here: no prompt of at most 3 tokens .* raise here\.prompt_tokens"):
        of([talks], longest=3)


def test_questions_are_those_before_a_first_answer(tmp_path: Path) -> None:
    """Of conversations alone, none twice, by weight, and no more than are needed."""
    system = {"messages": [{"role": "system", "content": "Be."}, *talk("Who?")["messages"]]}
    talks = lines(tmp_path / "talks.jsonl", [talk("Is it?"), {"text": "plain"}, talk("Is it?"), system, talk("No?")])

    def of(*sources: TextSource, tokens: int = 1000, longest: int | None = None) -> list[str]:
        section = Data(sources=sources)
        found = questions(section, TOKENIZER, tokens=tokens, longest=longest, name="here")
        return ["/".join(message["content"] for message in question) for question in found]

    assert of(talks) == ["Is it?", "Be./Who?", "No?"]
    assert of(talks, longest=28) == ["Is it?", "No?"]
    assert of(talks, tokens=30) == ["Is it?", "Be./Who?"]
    other = lines(tmp_path / "other.jsonl", [talk("A?"), talk("B?")])
    assert of(talks, other.model_copy(update={"weight": 0.1}), tokens=30) == ["Is it?", "Be./Who?", "A?"]
    plain = lines(tmp_path / "plain.jsonl", [{"text": "plain"}])
    with pytest.raises(UPQError, match=r"here: no question in the run's sources; give conversations"):
        of(plain)

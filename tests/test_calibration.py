"""What a block-wise stage calibrates on: the run's text, its sources of one domain, or sources of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny import byte_tokenizer
from upq.core.config import digest
from upq.core.errors import UPQError
from upq.data.config import MIXED, Data, TextSource, of_domain
from upq.data.held import HeldOut
from upq.files.metrics import METRICS, read_metrics
from upq.files.tensors import load_tensors
from upq.model.source import Source
from upq.run.recipe import Recipe
from upq.run.run import quantize
from victim import Victim, make_victim

CODE, JAVA = (
    TextSource(path=f"{name}.jsonl", domain="code", weight=weight) for name, weight in (("py", 1), ("java", 3))
)
MATHS, PLAIN = TextSource(path="sums.jsonl", domain="maths", weight=5), TextSource(path="plain.jsonl")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return make_victim(tmp_path_factory.mktemp("victim"))


def test_a_domain_is_its_sources_and_mixed_is_all_domains_alike() -> None:
    sources = (CODE, PLAIN, JAVA, MATHS)
    assert of_domain(sources, "code", "here") == (CODE, JAVA)
    assert [(each.path, each.weight) for each in of_domain(sources, MIXED, "here")] == [
        ("py.jsonl", 0.25), ("java.jsonl", 0.75), ("sums.jsonl", 1.0)
    ]  # fmt: skip
    with pytest.raises(UPQError, match=r"^here=law: no source .* the domain law; domains there: code, maths\."):
        of_domain(sources, "law", "here")
    with pytest.raises(UPQError, match=r"^here=mixed: .* domains there: none\."):
        of_domain((PLAIN,), MIXED, "here")


def test_a_source_without_a_domain_has_the_digest_of_before() -> None:
    assert "domain" not in PLAIN.model_dump(mode="json")
    assert digest(PLAIN) != digest(PLAIN.model_copy(update={"domain": "code"}))
    assert TextSource(**CODE.model_dump()) == CODE


def test_most_of_a_document_is_found_where_rows_have_cut_it() -> None:
    rng = np.random.default_rng(0)
    document, other = rng.integers(0, 1000, 100), rng.integers(0, 1000, 100)
    rows_NT = np.concatenate([other[60:], document]).reshape(-1, 35).astype(np.int32)
    rows_NT[:, 0] = 7  # each row begins with the same token
    held = HeldOut(torch.from_numpy(rows_NT))
    assert held.holds_most(document.tolist())
    assert not held.holds_most(other.tolist())  # of which less than half is there
    assert not held.holds_most([*range(2000, 2010)])
    assert held.holds_most(document[:10].tolist())
    assert held.holds(document[3:9].tolist())


def test_a_stage_calibrates_on_its_domain(victim: Victim, tmp_path: Path) -> None:
    """And the others on the run's text. What the run holds out is in neither."""
    sources = []
    for domain, word in (("code", "return {n} + x;"), ("maths", "The sum {n} is odd.")):
        path = tmp_path / f"{domain}.jsonl"
        path.write_text("".join(json.dumps({"text": word.format(n=n * n)}) + "\n" for n in range(150)))
        sources.append({"path": str(path), "domain": domain})
    blockwise = {"stage": "blockwise", "samples": 6, "method": {"name": "rtn", "scale": "hessian"}}
    stages: dict[str, Any] = {
        "first": {**blockwise, "bits": 4, "calibration": "code"},
        "second": {**blockwise, "bits": 3, "calibration": [{"path": sources[1]["path"]}]},
        "third": {**blockwise, "bits": 2},
    }
    recipe = Recipe.of({"data": {"seq_len": 32, "validation": 4, "sources": sources}, "stages": stages}, "here")
    quantize(victim.model, recipe, tmp_path / "out", keep_work=True)
    tokenizer, work = byte_tokenizer(bos="<s>", eos="</s>"), tmp_path / "out" / ".work"

    def text(name: str) -> str:
        rows_NT = load_tensors(work / name / "calibration.safetensors")[0]["tokens"]
        assert rows_NT.shape == (6, 32)
        return tokenizer.decode(rows_NT.flatten().tolist())

    assert "return" in text("first")
    assert "sum" not in text("first")
    assert "sum" in text("second")
    assert "return" not in text("second")
    assert "return" in text("third")
    assert "sum" in text("third")
    held = load_tensors(work / "tokens.safetensors")[0]["validation_tokens"].flatten().tolist()
    whole = [part for part in tokenizer.decode(held).split("</s><s>")[1:-1] if part]
    assert whole
    assert not [part for part in whole for name in ("first", "second") if f"<s>{part}</s>" in text(name)]
    assert not list(work.rglob("text.safetensors"))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("law", r"int2\.calibration=law: no source of data\.sources has the domain law"),
        ([], r"int2\.calibration: no sources"),
    ],
)
def test_what_is_not_there_is_one_line(victim: Victim, calibration: Any, message: str) -> None:
    stages = {"int2": {"stage": "blockwise", "bits": 2, "method": "rtn", "calibration": calibration}}
    stage = Recipe.of({"stages": stages}, "here").stages["int2"]
    with pytest.raises(UPQError, match=message) as caught:
        stage.check("int2", Source(victim.model), Data(sources=(CODE,)))
    assert "\n" not in str(caught.value)


LENGTHS: dict[str, Any] = {
    "int2": {"stage": "blockwise", "bits": 2, "samples": 5, "method": {"name": "rtn", "scale": "hessian"}},
    "distill": {"loss": "gjs", "tokens": 256, "batch_size": 2, "micro_batch_size": 2, "scale_lr": 1e-3},
}


def of_lengths(victim: Victim, out: Path, **lengths: int) -> Path:
    stages = {
        name: {**each, **({"seq_len": lengths[name]} if name in lengths else {})} for name, each in LENGTHS.items()
    }
    sources = victim.recipe().data.model_dump(mode="json")["sources"]
    recipe = Recipe.of({"data": {"seq_len": 32, "validation": 4, "sources": sources}, "stages": stages}, "here")
    quantize(victim.model, recipe, out, keep_work=True)
    return out


def test_a_stage_has_rows_of_its_own_length(victim: Victim, tmp_path: Path) -> None:
    """Longer or shorter than the run's; of the same text, without what the run holds out; as many tokens trained."""
    out = of_lengths(victim, tmp_path / "out", int2=48, distill=16)
    work = out / ".work"
    assert load_tensors(work / "int2" / "calibration.safetensors")[0]["tokens"].shape == (5, 48)
    rows_NT = load_tensors(work / "distill" / "text.safetensors")[0]["tokens"]
    assert rows_NT.shape == (16, 16)
    held_NT = load_tensors(work / "tokens.safetensors")[0]["validation_tokens"]
    assert held_NT.shape[1] == 32  # what all stages and the last check are measured on
    assert not {tuple(row) for row in held_NT[:, 1:16].tolist()} & {tuple(row) for row in rows_NT[:, 1:].tolist()}
    steps = [line["tokens"] for line in read_metrics(out / METRICS) if line["kind"] == "step"]
    assert steps == [32 * (n + 1) for n in range(8)]


def test_the_runs_own_length_changes_no_byte(victim: Victim, tmp_path: Path) -> None:
    plain, same = (
        of_lengths(victim, tmp_path / str(n), **own) for n, own in enumerate(({}, {"int2": 32, "distill": 32}))
    )
    assert (plain / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", list(LENGTHS))
def test_rows_longer_than_the_context_are_one_line(victim: Victim, tmp_path: Path, stage: str) -> None:
    with pytest.raises(UPQError, match=rf"^{stage}\.seq_len=100000 is more than the model's \d+; lower it$"):
        of_lengths(victim, tmp_path / "out", **{stage: 100_000})
    assert not (tmp_path / "out").exists()

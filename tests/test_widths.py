"""Widths of weights: the choice is exact and the best, the measurement is kept, equal widths change nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from schemes import ROUNDING
from test_blockwise import IDS, Counting, files, make
from tiny import tiny_model
from upq.blockwise import METHODS, BlockStore, walk
from upq.blockwise._widths import Sensitivity, allocate, load, measure, save
from upq.core.errors import UPQError
from upq.core.processes import ALONE
from upq.core.progress import Silent
from upq.core.scheme import QuantScheme
from upq.data.config import Data
from upq.model.source import Source
from upq.run.recipe import Recipe
from upq.run.run import check
from upq.stages.widths import Widths


def measured(weights: list[int], choices: tuple[int, ...] = (2, 3, 4)) -> list[Sensitivity]:
    generator = torch.Generator().manual_seed(sum(weights))
    return [
        Sensitivity(0, (str(i),), n, {b: float(torch.rand(1, generator=generator)) * 4.0**-b for b in choices})
        for i, n in enumerate(weights)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    return Source(path)


@pytest.mark.parametrize("mean", [2, 2.5, 3, 4])
@pytest.mark.parametrize("weights", [[64] * 6, [64, 128, 64, 256, 128, 128], [96, 96, 32, 32, 64]])
def test_the_choice_is_the_best_of_all_with_that_mean(weights: list[int], mean: float) -> None:
    found = measured(weights)

    def mean_of(bits: Any) -> float:
        return sum(n * b for n, b in zip(weights, bits, strict=True)) / sum(weights)

    def error_of(bits: Any) -> float:
        return sum(each.errors[b] for each, b in zip(found, bits, strict=True))

    exact = [bits for bits in itertools.product((2, 3, 4), repeat=len(weights)) if mean_of(bits) == mean]
    chosen = allocate(found, mean)
    assert mean_of(chosen) == mean
    assert error_of(chosen) == pytest.approx(min(map(error_of, exact)))


@pytest.mark.parametrize(("mean", "near"), [(2.3, "2.25 or 2.5"), (4.5, "3.75 or 4")])
def test_a_mean_that_cannot_be_met_is_one_line_with_the_nearest(mean: float, near: str) -> None:
    message = rf"a mean of exactly {mean} cannot be met with 2, 3, 4 bits and these weights; the nearest: {near}"
    with pytest.raises(UPQError, match=message) as caught:
        allocate(measured([64] * 4), mean)
    assert "\n" not in str(caught.value)


def test_a_mean_that_the_error_names_can_be_asked_for() -> None:
    found = measured([64, 128, 704])
    with pytest.raises(UPQError, match=r"the nearest: 2\.07143 or 2\.14286"):
        allocate(found, 2.1)
    bits = allocate(found, 2.07143)
    assert bits == [3, 2, 2]


def test_a_mean_beyond_the_choices_shows_before_work(model: Source) -> None:
    with pytest.raises(UPQError, match=r"w\.mean=1\.5 cannot be met with 2 to 4 bits; change w\.choices"):
        Widths(mean=1.5).check("w", model, Data())


def test_widths_that_no_stage_chose_show_before_work(model: Source) -> None:
    stages = {"int2": {"stage": "blockwise", "bits": 2, "mixed": True, "method": "rtn"}}
    recipe = Recipe.of({"data": {"seq_len": 8}, "stages": stages}, "here")
    with pytest.raises(UPQError, match=r"int2\.mixed: no stage before it chooses widths; put one of the kind `widths`"):
        check(tiny_model("llama").config, recipe, model, "model")


def test_a_measurement_is_what_rounding_alone_costs_and_resumes(model: Source, tmp_path: Path) -> None:
    """More bits, less error; a block that is there is not measured again."""
    scheme = QuantScheme(bits=2)

    def run() -> list[Sensitivity]:
        return measure(model, IDS[:4], scheme, (2, 4), folder=tmp_path, progress=Silent(), bf16=False, processes=ALONE)

    first = run()
    assert {name for each in first for name in each.names} == {matrix.name for matrix in model.matrices(0)}
    assert all(0 < each.errors[4] < each.errors[2] < 1 for each in first)
    raw = json.loads((tmp_path / "block-0001.json").read_text())
    raw[0]["weights"] = 7
    (tmp_path / "block-0001.json").write_text(json.dumps(raw))
    again = run()
    assert [each for each in again if each.block == 0] == [each for each in first if each.block == 0]
    assert next(each for each in again if each.block == 1).weights == 7


def test_the_file_of_a_measurement_says_what_it_was_measured_on(tmp_path: Path) -> None:
    found = measured([64, 128])
    save(tmp_path / "kept.json", "one", found)
    assert load(tmp_path / "kept.json", "one") == found
    with pytest.raises(UPQError, match=r"kept\.json: measured on another model, text, grid or choice of widths"):
        load(tmp_path / "kept.json", "other")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(UPQError, match=r"bad\.json: no measurement of widths"):
        load(tmp_path / "bad.json", "one")


@pytest.mark.parametrize("name", ROUNDING)
def test_equal_widths_are_the_plain_walk_and_others_are_their_own(name: str, model: Source, tmp_path: Path) -> None:
    names = [matrix.name for matrix in model.matrices(0)]
    mixed = dict.fromkeys(names[:2], 4) | dict.fromkeys(names[2:], 2)
    method = make(name, **({"iterations": 2} if METHODS.get(name).learns else {}))
    stores = {
        kind: BlockStore(tmp_path / kind, QuantScheme(bits=2), latents, widths)
        for kind, latents, widths in (
            ("plain", True, ()),
            ("equal", True, (dict.fromkeys(names, 2),) * 2),
            ("mixed", True, (mixed,) * 2),
            ("codes", False, (mixed,) * 2),
        )
    }
    for store in stores.values():
        walk(model, IDS[:4], method, store, given=None, seed=5, progress=Counting())
    assert files(stores["equal"]) == files(stores["plain"])
    for name, q in stores["mixed"].qtensors(0).items():
        assert q.scheme.bits == mixed[name]
        assert (q.codes_OI.max() > 3) == (mixed[name] == 4)
        assert torch.equal(stores["codes"].qtensors(0)[name].dequantize(), q.dequantize())
        assert torch.equal(stores["codes"].coded(0)[name].qtensor().dequantize(), q.dequantize())

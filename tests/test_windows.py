"""Walks in another order than one block after the other: windows, annealed inputs, blocks apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from test_blockwise import IDS, Counting, Killed, files, make
from tiny import tiny_model
from upq.blockwise import METHODS, BlockStore, Order, spans, walk
from upq.blockwise._windows import finals
from upq.core.errors import UPQError
from upq.core.outliers import threshold, truncated
from upq.core.scheme import QuantScheme
from upq.data.config import Data
from upq.model.source import Source
from upq.stages.blockwise import Blockwise

LEARNING = [name for name in METHODS.names() if METHODS.get(name).learns]
ORDERS = {
    "two": Order(window=2),
    "overlapping": Order(window=2, overlap=1),
    "growing": Order(window=2, overlap=1, grow=2),
    "annealed": Order(annealing=0.5),
    "both": Order(window=2, annealing=1.0),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", num_hidden_layers=4).save_pretrained(path)
    return Source(path)


def solved(model: Source, folder: Path, order: Order, name: str = "block_ap", limit: int = 99, **options: Any) -> int:
    """Blocks that this walk finished."""
    progress, store = Counting(limit), BlockStore(folder, QuantScheme(bits=2))
    method = make(name, **{**({"iterations": 4} if METHODS.get(name).learns else {}), **options})
    walk(model, IDS[:8], method, store, given=None, seed=5, progress=progress, order=order)
    return progress.blocks


def found(folder: Path) -> dict[str, bytes]:
    return files(BlockStore(folder, QuantScheme(bits=2)))


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_every_block_is_final_once_and_ends_never_go_back(blocks: int, window: int) -> None:
    if window > blocks:
        pytest.skip("longer than the model")
    for overlap in range(window):
        for grow in range(blocks // 2 + 1):
            windows = spans(blocks, Order(window, overlap, grow))
            assert [i for part in finals(windows, blocks) for i in part] == list(range(blocks))
            assert [w.start for w in windows] == sorted(w.start for w in windows)
            assert [w.stop for w in windows] == sorted(w.stop for w in windows)
            if not grow and overlap == window - 1:
                assert all(sum(i in w for w in windows) == window for i in range(window - 1, blocks - window + 1))


def test_windows_grow_and_shrink_at_the_ends() -> None:
    windows = spans(8, Order(window=2, overlap=1, grow=3))
    assert [(w.start, w.stop) for w in windows[:3]] == [(0, 1), (0, 2), (0, 3)]
    assert [(w.start, w.stop) for w in windows[-3:]] == [(5, 8), (6, 8), (7, 8)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 5}, r"int2\.window=5 is longer than the model, which has 4 blocks; lower it"),
        ({"window": 2, "overlap": 2}, r"int2\.overlap=2 must be less than window=2"),
        ({"grow": 3}, r"int2\.grow=3 at either end is more than the model's 4 blocks"),
        ({"window": 2, "method": "gptq"}, r"int2: gptq does not learn .* one of adaround, block_ap, flexround, lora_"),
        ({"annealing": 0.5, "inputs": "original"}, r"int2\.inputs=original solves each block alone"),
    ],
)
def test_what_makes_no_sense_is_one_line(settings: dict[str, Any], message: str, model: Source) -> None:
    with pytest.raises(UPQError, match=message) as caught:
        Blockwise(**{"bits": 2, "method": "block_ap", **settings}).check("int2", model, Data())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LEARNING)
def test_windows_of_one_block_are_the_plain_walk(
    name: str, model: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved(model, tmp_path / "plain", Order(), name)
    monkeypatch.setattr(Order, "plain", property(lambda _self: False))
    solved(model, tmp_path / "windows", Order(), name)
    assert found(tmp_path / "windows") == found(tmp_path / "plain")


@pytest.mark.parametrize("kind", ORDERS)
def test_killed_and_resumed_is_never_killed(kind: str, model: Source, tmp_path: Path) -> None:
    order = ORDERS[kind]
    assert solved(model, tmp_path / "whole", order) == 4
    solved(model, tmp_path / "plain", Order())
    whole = found(tmp_path / "whole")
    assert whole != found(tmp_path / "plain")
    assert {path.name for path in (tmp_path / "whole").iterdir()} == set(whole)  # nothing is pending
    for done in (1, 3) if kind == "both" else (2,):
        with pytest.raises(Killed):
            solved(model, tmp_path / str(done), order, limit=done)
        assert solved(model, tmp_path / str(done), order) == 4 - done
        assert found(tmp_path / str(done)) == whole
    assert solved(model, tmp_path / "whole", order) == 0


def test_a_window_goes_on_from_what_the_one_before_has_learned(model: Source, tmp_path: Path) -> None:
    """Steps too small to move anything leave each block as its first window has it."""
    tiny = {"lr": 1e-12, "scale_lr": 1e-12}
    for name, order in {"once": Order(window=2), "twice": Order(window=2, overlap=1)}.items():
        solved(model, tmp_path / name, order, **tiny)
    once, twice = (BlockStore(tmp_path / name, QuantScheme(bits=2)).weights(1) for name in ("once", "twice"))
    for name, weight in once.items():
        torch.testing.assert_close(twice[name], weight, rtol=1e-5, atol=1e-7)


def test_a_window_of_two_lowers_the_error_behind_both(model: Source, tmp_path: Path) -> None:
    errors = {}
    for name, order in {"one": Order(), "two": Order(window=2, overlap=1)}.items():
        solved(model, tmp_path / name, order, iterations=60)
        errors[name] = BlockStore(tmp_path / name, QuantScheme(bits=2)).report(3)["mlp.up_proj"]["block"]
    assert errors["two"] < errors["one"]


def test_blocks_apart_do_not_depend_on_one_another(model: Source, tmp_path: Path) -> None:
    """Any of them may be there already, from another method even."""
    order = Order(apart=True)
    solved(model, tmp_path / "whole", order)
    whole = found(tmp_path / "whole")
    solved(model, tmp_path / "other", order, "gptq")
    for left in range(4):
        folder = tmp_path / str(left)
        folder.mkdir()
        for name, data in found(tmp_path / "other").items():
            if f"{left:04d}" not in name:
                (folder / name).write_bytes(data)
        assert solved(model, folder, order) == 1
        name = f"block-{left:04d}.safetensors"
        assert found(folder)[name] == whole[name]
    solved(model, tmp_path / "plain", Order())
    plain = found(tmp_path / "plain")
    assert plain["block-0000.safetensors"] == whole["block-0000.safetensors"]  # it reads the embeddings
    assert plain["block-0002.safetensors"] != whole["block-0002.safetensors"]


def test_truncation_changes_only_what_is_above_the_threshold() -> None:
    w_OI = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    w_OI[3, 5], w_OI[7, 1] = 40.0, -40.0
    limit = threshold(w_OI.abs())
    assert limit is not None
    cut_OI = truncated(w_OI)
    above = w_OI.abs() > limit
    assert above.sum() == 2
    assert torch.equal(cut_OI[~above], w_OI[~above])
    assert torch.equal(cut_OI[above].sign(), w_OI[above].sign())
    assert cut_OI.abs().max() == w_OI.abs()[~above].max()


def test_the_threshold_is_that_of_a_search_over_every_cut() -> None:
    values = torch.rand(400, generator=torch.Generator().manual_seed(2)).double() ** 6
    low, high = (values.kthvalue(round(share * len(values))).values for share in (0.25, 0.75))
    coarse = high + 1.5 * (high - low)
    candidates, rest = values[values > coarse].sort().values, values[values <= coarse]
    scores = []
    for cut in range(len(candidates)):
        upper, below = candidates[cut:], candidates[:cut]
        distance = (upper.mean() - torch.cat([rest, below]).mean()) ** 2
        scores.append(float(distance - upper.var(correction=0) - (below.var(correction=0) if cut else 0.0)))
    cut = scores.index(max(scores))
    expected = candidates[cut - 1] if cut else rest.max()
    assert threshold(values) == expected


def test_a_block_without_outliers_stays_as_it_is() -> None:
    w_OI = torch.linspace(-1, 1, 64).view(4, 16)
    assert threshold(w_OI.abs()) is None
    assert torch.equal(truncated(w_OI), w_OI)


def test_settings_that_came_later_are_in_no_digest_at_their_default() -> None:
    """So a stage that was done before they came still holds."""
    plain = Blockwise(bits=2, method="rtn")
    assert not {"window", "overlap", "grow", "inputs", "annealing", "mixed", "truncate"} & plain.settings().keys()
    assert Blockwise(bits=2, method="block_ap", window=2).settings() == {
        **Blockwise(bits=2, method="block_ap").settings(),
        "window": 2,
    }

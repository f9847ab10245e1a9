"""Attention sinks: the massive state that a few weights give the first token survives 2 bits, and is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sink
from schemes import ROUNDING
from upq.artifact.card import model_card
from upq.artifact.manifest import Manifest, SourceModel, read_manifest, write_manifest
from upq.blockwise import METHODS, BlockStore, walk
from upq.blockwise._tokens import MASSIVE, tokens_of
from upq.core.processes import ALONE
from upq.core.progress import Silent
from upq.core.scheme import QuantScheme
from upq.model.source import Source

# With the inputs before their eyes, and little else: rounding alone keeps the state at the price of all other tokens.
KEEPS: dict[str, dict[str, Any]] = {
    "rtn": {"scale": "hessian"},
    "gptq": {"scale": "hessian"},
    "flexround": {"scale": "hessian", "relative": True, "iterations": 100, "lr": 3e-2},
    "block_ap": {"scale": "hessian", "relative": True, "iterations": 200, "lr": 1e-2, "start": "gptq"},
    "adaround": {"scale": "hessian", "relative": True, "iterations": 200, "lr": 1e-1},
    "lora_round": {"scale": "hessian", "relative": True, "iterations": 200, "lr": 1e-1},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sink")
    sink.sink_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return sink.rows(32, 24)


def walked(model: Path, rows: Tensor, out: Path, method: str, **options: Any) -> BlockStore:
    store, cls = BlockStore(out, QuantScheme(bits=2)), METHODS.get(method)
    walk(Source(model), rows, cls(cls.Config(**options)), store, given=None, seed=0, progress=Silent())
    return store


class TestTheModel:
    def test_attention_rests_on_a_state_a_hundred_times_the_others(self, rows: Tensor) -> None:
        model = sink.sink_model()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            out = model(rows, output_hidden_states=True, output_attentions=True)
        before, made = (out.hidden_states[i].norm(dim=-1) for i in (sink.BLOCK, sink.BLOCK + 1))
        assert before[:, 0].max() < 3 * before[:, 1:].median()
        assert made[:, 0].min() > 100 * made[:, 1:].median()
        assert out.attentions[sink.BLOCK + 1][:, :, 1:, 0].mean() > 0.5
        assert out.attentions[sink.BLOCK][:, :, 5:, 0].mean() < 0.2


@pytest.mark.parametrize("method", ROUNDING)
def test_the_sink_survives_two_bits(method: str, model: Path, rows: Tensor, tmp_path: Path) -> None:
    store = walked(model, rows, tmp_path, method, **KEEPS[method])
    assert store.massive(0) is None
    for block in (sink.BLOCK, sink.BLOCK + 1):
        massive, others = store.massive(block), store.report(block)["mlp.up_proj"]["block"]
        assert massive is not None
        assert massive["error"] < 0.5
        if "relative" in KEEPS[method]:
            assert others < 0.5


def test_tokens_and_weights_are_named(model: Path, rows: Tensor, tmp_path: Path) -> None:
    store = walked(model, rows, tmp_path, "rtn", scale="hessian")
    made, handed_on = store.massive(sink.BLOCK), store.massive(sink.BLOCK + 1)
    assert made is not None
    assert handed_on is not None
    (weight,) = made["weights"]
    assert (weight["name"], weight["row"], weight["column"]) == ("mlp.down_proj", sink.CHANNEL, sink.NEURON)
    assert (weight["value"], weight["share"]) == (3.0, pytest.approx(1.0, abs=0.05))
    assert handed_on["weights"] == []
    for found in (made, handed_on):
        assert (found["tokens"], found["of"]) == (len(rows), rows.numel())
        assert (found["ids"], found["first"], found["channel"]) == ([sink.BOS], 8, sink.CHANNEL)
        assert found["norm"] > MASSIVE * found["usual"]


def test_the_manifest_and_the_card_name_them(model: Path, rows: Tensor, tmp_path: Path) -> None:
    store = walked(model, rows, tmp_path / "blocks", "rtn", scale="hessian")
    massive = {index: found for index in range(3) if (found := store.massive(index)) is not None}
    manifest = Manifest(model=SourceModel(path="m", digest=""), massive=massive)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    card = model_card(manifest)
    assert f"`mlp.down_proj` [{sink.CHANNEL}, {sink.NEURON}]" in card
    assert f"| {sink.BLOCK} | {len(rows)} of {rows.numel()} |" in card


class TestTokens:
    def states(self) -> Tensor:
        states_NTH = torch.randn(6, 10, 16, generator=torch.Generator().manual_seed(0))
        states_NTH[1, 3] *= 500
        states_NTH[4, 0] *= 300
        states_NTH[2, 2] = 0
        return states_NTH

    def test_those_far_above_the_geometric_mean_are_massive(self) -> None:
        states_NTH = self.states()
        tokens = tokens_of(states_NTH, 0.1 * states_NTH, ALONE)
        assert tokens.massive_NT.nonzero().tolist() == [[1, 3], [4, 0]]
        norms = states_NTH.norm(dim=-1)
        assert tokens.usual == pytest.approx(norms[norms > 0].log().mean().exp().item(), rel=1e-5)

    def test_both_kinds_count_the_same_but_never_more_than_a_row(self) -> None:
        states_NTH = self.states()
        rare = tokens_of(states_NTH, 0.1 * states_NTH, ALONE)
        assert rare.balance == 10  # 58 others for 2; a row has 10
        states_NTH[:, :4] *= 500
        assert tokens_of(states_NTH, 0.1 * states_NTH, ALONE).balance == pytest.approx(37 / 23)  # that of zeros stays

    def test_an_error_of_a_kind_is_worth_the_same_whatever_the_size(self) -> None:
        """Relative to each token's own size, the loss of outputs that are all a tenth too large is that of one."""
        states_NTH = self.states()
        tokens = tokens_of(states_NTH, 0.1 * states_NTH, ALONE)
        error_NT = (0.1 * states_NTH).square().mean(-1) * tokens.relative_NT
        error_NT = error_NT[states_NTH.any(-1)]
        torch.testing.assert_close(error_NT, torch.full_like(error_NT, 0.01), rtol=2e-2, atol=0)

    def test_a_state_that_is_taken_back_has_the_size_that_it_had(self) -> None:
        before_NTH, after_NTH = self.states(), torch.ones(6, 10, 16)
        tokens = tokens_of(after_NTH, before_NTH, ALONE)
        assert tokens.massive_NT.nonzero().tolist() == [[1, 3], [4, 0]]
        size = before_NTH[1, 3].square().mean()
        torch.testing.assert_close(1 / tokens.relative_NT[1, 3], size, rtol=1e-3, atol=0)

    def test_states_without_outliers_have_none(self) -> None:
        states_NTH = torch.randn(6, 10, 16, generator=torch.Generator().manual_seed(0))
        tokens = tokens_of(states_NTH, 0.1 * states_NTH, ALONE)
        assert not tokens.massive
        assert tokens.balance == 1
        assert torch.equal(tokens.weights_NT, tokens.relative_NT)

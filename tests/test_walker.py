"""The walk over decoder blocks: each block is called as the model's own forward calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tiny import FAMILIES, tiny_model
from upq.core.errors import UPQError
from upq.model.head import Head
from upq.model.layout import block_list, layout_of
from upq.model.source import Source
from upq.model.walker import Replay, walk
from zoo import MODELS, WRAPPERS, by_speed, random_model

IDS = torch.randint(3, 60, (11, 17), generator=torch.Generator().manual_seed(0))  # more rows than one batch


def _decoder(model: PreTrainedModel) -> Any:
    return model.get_submodule(layout_of(model).decoder)


def written(model: PreTrainedModel, ids_NT: Tensor, batch_size: int) -> list[Tensor]:
    """What each block writes (N, T, H), by the model's own forward."""
    blocks, parts = block_list(model), list[list[Tensor]]()
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: parts[-1].append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.no_grad():
        for ids_BT in ids_NT.split(batch_size):
            parts.append([])
            _decoder(model)(ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(each) for each in zip(*parts, strict=True)]


@pytest.fixture(scope="module", params=by_speed([*MODELS, *WRAPPERS]))
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Source]:
    """A model, and what lies on disk of it in the layout of its checkpoints."""
    model, path = random_model(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, Source(path)


@pytest.mark.parametrize("batch_size", [4])
def test_blocks_write_what_they_write_in_the_whole_model(
    stored: tuple[PreTrainedModel, Source], batch_size: int
) -> None:
    """Bit for bit: masks, rotations, states that blocks share, and what a decoder adds between them."""
    model, source = stored
    expected = written(model, IDS, batch_size)
    for step in walk(source, IDS, batch_size=batch_size):
        step.advance(source.block(step.index))
        assert torch.equal(step.states[0], expected[step.index]), step.index
    assert step.index == len(expected) - 1


def test_head_and_end_of_the_decoder_are_those_of_the_whole_model(stored: tuple[PreTrainedModel, Source]) -> None:
    """Bit for bit, with what a family does to its logits."""
    model, source = stored
    blocks = written(model, IDS, len(IDS))
    hidden = Replay(source).finish(IDS, blocks[-1])
    assert torch.equal(hidden, _decoder(model)(IDS, use_cache=False).last_hidden_state)
    one = _decoder(model)(IDS[:1], use_cache=False).last_hidden_state[0]
    logits = model(IDS[:1], use_cache=False).logits[0]
    assert torch.equal(Head(model)(one), logits)
    assert torch.equal(Head(source.without_blocks(), source.layout)(one), logits)


def test_a_checkpoint_holds_the_tensors_that_transformers_loads(stored: tuple[PreTrainedModel, Source]) -> None:
    """Under the names in memory, whatever names and pieces the files have."""
    model, source = stored
    state = model.state_dict()
    for index in range(len(source)):
        for name, tensor in source.block(index).state_dict().items():
            assert torch.equal(tensor, state[source.path_of(index, name)]), name
    for name, tensor in source.without_matrices().state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, state[name]), name


def test_rows_one_by_one_are_called_as_a_batch_of_them(stored: tuple[PreTrainedModel, Source]) -> None:
    """A method draws rows: their output is that of a walk over these rows alone."""
    _, source = stored
    rows = torch.tensor([7, 0, 7])
    for step, alone in zip(walk(source, IDS), walk(source, IDS[rows]), strict=True):
        block = source.block(step.index)
        found = step.run(block, rows)
        alone.advance(block)
        assert torch.allclose(found, alone.states[0], atol=1e-6)
        step.advance(block)


LAYERS = ["sliding_attention", "full_attention"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    ("mistral", {"sliding_window": 4}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": LAYERS}),
    ("smollm3", {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
]


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join((v[0], *v[1])))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    name, overrides = request.param
    tiny_model(name, **overrides).save_pretrained(tmp_path)
    return Source(tmp_path)


class TestFromDisk:
    def test_blocks_write_what_they_write_in_the_whole_model(self, source: Source) -> None:
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
        expected = written(model, IDS, 4)
        for step in walk(source, IDS, batch_size=4):
            step.advance(source.block(step.index))
            assert torch.equal(step.states[0], expected[step.index]), step.index

    def test_calls_follow_from_the_shape_of_a_batch(self, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
        """So a step replays the forward once for each batch size, and embeddings are read once."""
        calls, read = list[int](), list[int]()
        call, look_up = Replay.call, Source._rows
        monkeypatch.setattr(Replay, "call", lambda self, i, *a: (calls.append(i), call(self, i, *a))[1])
        monkeypatch.setattr(
            Source, "_rows", lambda self, name, ids: (read.append(len(ids)), look_up(self, name, ids))[1]
        )
        for step in walk(source, IDS, batch_size=4):
            block = source.block(step.index)
            for _ in range(3):
                step.run(block, torch.tensor([1, 2]))
            step.advance(block)
        assert len(read) == 3
        assert calls == [0, 0, 0, *(i for i in range(len(source)) for _ in (2, 4, 3))]

    def test_streams_go_their_own_ways(self, source: Source) -> None:
        steps = walk(source, IDS, streams=2)
        step = next(steps)
        before = step.states[1].clone()
        assert torch.equal(step.states[0], before)
        step.advance(source.block(0), stream=0)
        assert torch.equal(step.states[1], before)
        assert not torch.equal(step.states[0], before)


class Reordered(nn.ModuleList):
    """Blocks that a decoder runs in another order."""

    def __init__(self, blocks: nn.ModuleList, order: list[int]) -> None:
        super().__init__(blocks)
        self._run = [blocks[index] for index in order]

    def __getitem__(self, _: Any) -> Any:  # decoders take the first `num_hidden_layers`
        return self._run


@pytest.mark.parametrize("order", [[0, 1, 1], [1, 0], [0, 1, 0, 1], [0]])
def test_blocks_that_do_not_run_once_each_in_order_are_refused(order: list[int], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    source = Source(tmp_path)
    skeleton = source.skeleton()
    skeleton.model.layers = Reordered(skeleton.model.layers, order)
    source.skeleton = lambda: skeleton  # type: ignore[method-assign]
    with pytest.raises(UPQError) as caught:
        walk(source, IDS)
    assert str(caught.value) == (
        f"{tmp_path}: its 2 decoder blocks run in the order {order}; "
        "UPQ reads models whose blocks run once each, in order"
    )


def test_the_skeleton_is_as_before_after_a_call(tmp_path: Path) -> None:
    """A block has its own forward again, after an error too."""
    tiny_model("llama").save_pretrained(tmp_path)
    replay = Replay(Source(tmp_path))
    with pytest.raises(Exception, match=r"."):
        replay.call(1, IDS[:2], torch.zeros(2, 17, 5))
    assert not any("forward" in vars(block) for block in replay._blocks)

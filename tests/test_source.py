"""A model read block by block computes what the whole model computes; a damaged one is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tiny import FAMILIES, tiny_model
from upq.core.errors import UPQError
from upq.model.head import Head
from upq.model.loading import load_model
from upq.model.source import Source
from upq.model.walker import Replay, walk

IDS = torch.randint(2, 67, (11, 13), generator=torch.Generator().manual_seed(0))  # more rows than one batch
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    ("mistral", {"sliding_window": 4}),
    ("qwen2", {**SLIDING, "num_hidden_layers": 3, "layer_types": ["full_attention"] + 2 * ["sliding_attention"]}),
    ("qwen3", {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}),
    ("smollm3", {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
]


@torch.no_grad()
def streamed_logits(source: Source, ids_NT: Tensor, batch_size: int = 8) -> Tensor:
    for step in walk(source, ids_NT, batch_size=batch_size):
        step.advance(source.block(step.index))
    head = Head(source.without_blocks(), source.layout)
    hidden_NTH = Replay(source).finish(ids_NT, step.states[0][:])
    return torch.stack([head(hidden_TH) for hidden_TH in hidden_NTH])


def embedded(path: Path) -> Tensor:
    """Hidden states before the first block."""
    return next(walk(Source(path), IDS)).states[0][:]


@pytest.mark.parametrize(
    ("name", "overrides"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain"
)
def test_blocks_in_order_are_the_whole_model(name: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(name, **overrides)
    model.save_pretrained(tmp_path)
    stream = Source(tmp_path)
    assert len(stream) == model.config.num_hidden_layers
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(streamed_logits(stream, IDS), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(streamed_logits(stream, IDS, batch_size=2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides"), [v for v in VARIANTS if "sliding_window" in v[1] or "no_rope_layers" in v[1]]
)
def test_the_variants_differ_from_the_plain_family(name: str, overrides: dict[str, Any]) -> None:
    """The test above means something: window and missing rotation change the logits."""
    changed, count = tiny_model(name, **overrides), overrides.get("num_hidden_layers", 2)
    plain_options = {"sliding_window": None} if name == "mistral" else {}
    plain = tiny_model(name, num_hidden_layers=count, **plain_options)
    plain.load_state_dict(changed.state_dict())
    with torch.no_grad():
        assert (changed(IDS).logits - plain(IDS).logits).abs().max() > 1e-2


@pytest.mark.parametrize("layout", ["tied", "untied", "tied, but with a head of its own"])
def test_without_blocks_it_is_the_whole_model_but_for_them(layout: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=layout == "tied")
    model.save_pretrained(tmp_path)
    if layout.startswith("tied, but"):
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    whole, stream = load_model(tmp_path), Source(tmp_path)
    frame = stream.without_blocks()
    for (name, expected), (_, found) in zip(
        [*whole.named_parameters(remove_duplicate=False), *whole.named_buffers()],
        [*frame.named_parameters(remove_duplicate=False), *frame.named_buffers()],
        strict=True,
    ):
        assert found.is_meta if ".layers." in name else torch.equal(found, expected), name
    shared = frame.lm_head.weight is frame.model.embed_tokens.weight
    assert shared == (whole.lm_head.weight is whole.model.embed_tokens.weight) == (layout == "tied")


def test_reading_twice_gives_the_same(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    stream = Source(tmp_path)
    assert torch.equal(streamed_logits(stream, IDS), streamed_logits(stream, IDS))
    first, second = stream.block(0), stream.block(0)
    first.mlp.up_proj.weight.data.zero_()
    assert torch.equal(second.mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_only_what_is_asked_for_takes_memory(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    stream = Source(tmp_path)
    next(walk(stream, IDS))
    stream.block(1)
    assert all(p.is_meta for p in stream.outline.parameters())
    assert {name for name, p in stream.skeleton().named_parameters() if not p.is_meta} == {"model.norm.weight"}
    assert {matrix.name: matrix.inputs for matrix in stream.matrices(1)[-2:]} == {
        "mlp.up_proj": 32,
        "mlp.down_proj": 44,
    }


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    model = tiny_model("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    block = Source(tmp_path).block(1)
    weight = block.get_submodule("mlp.down_proj").weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.model.layers[1].mlp.down_proj.weight.float())
    assert not any(p.requires_grad for p in block.parameters())


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_models_own_type_is_the_one_it_loads_in(dtype: torch.dtype, named: bool, tmp_path: Path) -> None:
    model = tiny_model("llama").to(dtype)
    model.save_pretrained(tmp_path)
    if not named:
        file = tmp_path / "config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "dtype"}))
    stream = Source(tmp_path, dtype="auto")
    assert stream.dtype == load_model(tmp_path).dtype == dtype
    assert torch.equal(stream.block(1).mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return model, tmp_path


def test_a_sharded_checkpoint_is_the_same_model(sharded: tuple[PreTrainedModel, Path]) -> None:
    model, path = sharded
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(streamed_logits(Source(path), IDS), expected, rtol=1e-4, atol=1e-5)


def test_a_missing_shard_is_named(sharded: tuple[PreTrainedModel, Path]) -> None:
    _, path = sharded
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UPQError, match=rf"{path}: shard {shard.name} named by the index is missing; .*download"):
        Source(path)


def test_a_shard_outside_the_directory_is_refused(sharded: tuple[PreTrainedModel, Path]) -> None:
    _, path = sharded
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    (path.parent / "elsewhere.safetensors").write_bytes(b"")
    with pytest.raises(UPQError, match=r"elsewhere\.safetensors"):
        Source(path)


def test_a_truncated_shard_is_named(sharded: tuple[PreTrainedModel, Path]) -> None:
    _, path = sharded
    for shard in path.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UPQError, match=rf"{path}/model-.*\.safetensors: damaged.*download"):
        Source(path).block(0)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_index_is_named(sharded: tuple[PreTrainedModel, Path], text: str) -> None:
    _, path = sharded
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UPQError, match=r"model\.safetensors\.index\.json: .*download"):
        Source(path)


EMBEDDING = "model.embed_tokens.weight"


def test_of_the_embedding_only_the_rows_of_the_tokens_are_read(tmp_path: Path) -> None:
    """Damage in a row that no token asks for is not noticed, and in one that a token asks for it is named."""
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    expected_NTH = embedded(tmp_path)
    weight_VH = load_file(file)[EMBEDDING]
    assert torch.equal(expected_NTH, weight_VH[IDS])
    assert 0 not in IDS
    for token, damaged in ((0, False), (int(IDS[10, 12]), True)):
        save_file(load_file(file) | {EMBEDDING: weight_VH.index_fill(0, torch.tensor([token]), torch.nan)}, file)
        if damaged:
            with pytest.raises(UPQError, match=rf"{tmp_path}: tensor {EMBEDDING} holds NaN or infinity; .*damaged"):
                embedded(tmp_path)
        else:
            assert torch.equal(embedded(tmp_path), expected_NTH)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: None, f"tensor {NAME} is missing from the checkpoint; is the download complete"),
        (lambda w: w[:, :-1], rf"tensor {NAME} has shape \(44, 31\), but the config says \(44, 32\); is config\.json"),
        (lambda w: w.index_fill(0, torch.tensor([3]), torch.nan), f"tensor {NAME} holds NaN or infinity; .*damaged"),
        (lambda w: w.index_fill(1, torch.tensor([3]), torch.inf), f"tensor {NAME} holds NaN or infinity; .*damaged"),
    ],
    ids=["missing", "shape", "nan", "inf"],
)
def test_a_damaged_tensor_is_named(change: Any, message: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors.pop(NAME))
    save_file(tensors | ({} if changed is None else {NAME: changed.contiguous()}), file)
    stream = Source(tmp_path)
    stream.block(0)
    with pytest.raises(UPQError, match=message) as caught:
        stream.block(1)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("pytorch_model.bin", r"found pytorch_model\.bin, a pickle, .* python -c .*save_pretrained"),
        (None, "is the download complete"),
    ],
)
def test_without_safetensors_the_remedy_is_named(file: str | None, remedy: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if file:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(UPQError, match=rf"{tmp_path}: no model\.safetensors; {remedy}"):
        Source(tmp_path)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UPQError, match=rf"{tmp_path}: no config\.json"):
        Source(tmp_path)
    with pytest.raises(UPQError, match="no such directory"):
        Source(tmp_path / "nowhere")

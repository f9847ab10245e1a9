"""Law: figures equal a float64 computation from the definition, whatever the batches and chunks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tiny import FAMILIES, tiny_model
from upq.artifact.size import model_size, weights_bytes
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.core.scheme import QuantScheme
from upq.evals import evaluate_text, streamed
from upq.grids import GRIDS
from upq.model.activations import allocator
from upq.model.loading import load_model
from upq.model.source import Source
from upq.nn.blocks import block_weights
from upq.nn.fake_quant import FakeQuantLinear
from upq.nn.packed import PackedLinear

VOCABULARY = 61


def tiny(seed: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,  # confident enough that models differ
    }
    return LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()


@pytest.fixture
def tokens_NT() -> Tensor:
    return torch.randint(0, VOCABULARY, (7, 19), generator=torch.Generator().manual_seed(5))


def from_definition(model: nn.Module, teacher: nn.Module, tokens_NT: Tensor, mask_NT: Tensor) -> dict[str, float]:
    """One token at a time, float64, full logits."""
    with torch.no_grad():
        student_NTV = model.double()(tokens_NT).logits
        teacher_NTV = teacher.double()(tokens_NT).logits
    nll, teacher_nll, kld, top1, tokens = 0.0, 0.0, 0.0, 0, 0
    for row in range(tokens_NT.shape[0]):
        for t in range(tokens_NT.shape[1] - 1):
            if not mask_NT[row, t + 1]:
                continue
            target = tokens_NT[row, t + 1]
            logp_V, logq_V = teacher_NTV[row, t].log_softmax(0), student_NTV[row, t].log_softmax(0)
            nll -= logq_V[target].item()
            teacher_nll -= logp_V[target].item()
            kld += sum(math.exp(p) * (p - q) for p, q in zip(logp_V.tolist(), logq_V.tolist(), strict=True))
            top1 += int(logp_V.argmax() == logq_V.argmax())
            tokens += 1
    return {
        "ppl": math.exp(nll / tokens),
        "teacher_ppl": math.exp(teacher_nll / tokens),
        "kld": kld / tokens,
        "top1": top1 / tokens,
        "tokens": tokens,
    }


def test_equals_the_definition(tokens_NT: Tensor) -> None:
    model, teacher = tiny(0), tiny(1)
    mask_NT = torch.rand(tokens_NT.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    found = evaluate_text(model, tokens_NT, teacher=teacher, mask_NT=mask_NT, batch_size=3, chunk_tokens=5)
    for name, value in from_definition(model, teacher, tokens_NT, mask_NT).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name


def test_without_a_teacher_only_perplexity(tokens_NT: Tensor) -> None:
    found = evaluate_text(tiny(0), tokens_NT)
    assert found.tokens == 7 * 18
    assert (found.kld, found.top1, found.teacher_ppl, found.kld_stderr) == (None, None, None, None)


def test_a_model_is_at_no_distance_from_itself(tokens_NT: Tensor) -> None:
    model = tiny(0)
    for teacher in (model, copy.deepcopy(model)):
        found = evaluate_text(model, tokens_NT, teacher=teacher)
        assert (found.kld, found.top1, found.kld_stderr, found.top1_stderr) == (0, 1, 0, 0)
        assert found.teacher_ppl == found.ppl


@pytest.mark.parametrize(("batch_size", "chunk_tokens"), [(1, 1), (2, 7), (7, 1000), (100, 18), (3, 19)])
def test_batches_and_chunks_do_not_matter(tokens_NT: Tensor, batch_size: int, chunk_tokens: int) -> None:
    model, teacher = tiny(0), tiny(1)
    one = evaluate_text(model, tokens_NT, teacher=teacher)
    other = evaluate_text(model, tokens_NT, teacher=teacher, batch_size=batch_size, chunk_tokens=chunk_tokens)
    for name in ("ppl", "kld", "teacher_ppl", "kld_stderr"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-5), name
    assert (other.top1, other.tokens) == (one.top1, one.tokens)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_read_block_by_block_a_model_has_the_figures_of_the_whole(
    family: str, dtype: torch.dtype, on_disk: bool, tokens_NT: Tensor, tmp_path: Path, device: str
) -> None:
    """As the model and as the teacher, bit for bit, in its own type."""
    for seed, name in enumerate(("model", "teacher")):
        tiny_model(family, seed=seed, tie_word_embeddings=on_disk).to(dtype).save_pretrained(tmp_path / name)
    model, teacher = (load_model(tmp_path / name, device=device) for name in ("model", "teacher"))
    assert model.dtype == dtype
    mask_NT = torch.rand(tokens_NT.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    whole = evaluate_text(model, tokens_NT, teacher=teacher, mask_NT=mask_NT)
    with allocator(tmp_path if on_disk else None) as allocate:
        first, second = (
            streamed(Source(tmp_path / name, device=device, dtype="auto"), tokens_NT, allocate=allocate)
            for name in ("model", "teacher")
        )
        assert evaluate_text(first, tokens_NT, teacher=second, mask_NT=mask_NT) == whole
        assert evaluate_text(model, tokens_NT, teacher=second, mask_NT=mask_NT) == whole
    assert whole.teacher_ppl == evaluate_text(teacher, tokens_NT, mask_NT=mask_NT).ppl


def test_blocks_of_another_take_the_place_of_a_models_own(tokens_NT: Tensor, tmp_path: Path) -> None:
    for seed, name in enumerate(("model", "other")):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
    stream, other, mixed = Source(tmp_path / "model"), *(load_model(tmp_path / n) for n in ("other", "model"))
    mixed.model.layers[1] = other.model.layers[1]
    found = streamed(stream, tokens_NT, block=lambda i: other.model.layers[1] if i == 1 else stream.block(i))
    assert evaluate_text(found, tokens_NT) == evaluate_text(mixed, tokens_NT)


def test_masked_padding_changes_nothing(tokens_NT: Tensor) -> None:
    model, teacher = tiny(0), tiny(1)
    padded_NT = torch.cat([tokens_NT, torch.full((7, 6), 3)], dim=1)
    mask_NT = torch.arange(25).expand(7, -1) < 19
    one = evaluate_text(model, tokens_NT, teacher=teacher)
    other = evaluate_text(model, padded_NT, teacher=teacher, mask_NT=mask_NT)
    assert other.tokens == one.tokens
    assert other.kld == pytest.approx(one.kld, rel=1e-5)
    assert other.ppl == pytest.approx(one.ppl, rel=1e-5)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(tokens_NT: Tensor) -> None:
    model = tiny(0)
    nn.init.zeros_(model.lm_head.weight)
    assert evaluate_text(model, tokens_NT).ppl == pytest.approx(VOCABULARY, rel=1e-6)


def test_standard_error_is_that_of_the_rows(tokens_NT: Tensor) -> None:
    model, teacher = tiny(0), tiny(1)
    rows = [evaluate_text(model, row_T[None], teacher=teacher) for row_T in tokens_NT]
    assert rows[0].kld_stderr is None
    kld_N = torch.tensor([row.kld for row in rows], dtype=torch.float64)
    found = evaluate_text(model, tokens_NT, teacher=teacher)
    assert found.kld_stderr == pytest.approx(float(kld_N.std() / math.sqrt(7)), rel=1e-5)


def test_logits_of_more_than_a_chunk_never_exist(tokens_NT: Tensor) -> None:
    model, seen = tiny(0), []
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[1:]))
    evaluate_text(model, tokens_NT, chunk_tokens=11)
    assert max(shape[0] for shape in seen) == 11
    assert sum(shape[0] for shape in seen) == 7 * 18


def test_training_mode_comes_back_and_progress_counts_rows(tokens_NT: Tensor) -> None:
    class Rows(Silent):
        seen = 0

        def advance(self, units: int = 1, **figures: float) -> None:
            self.seen += units
            assert figures["ppl"] > 1

    rows, model = Rows(), tiny(0).train()
    evaluate_text(model, tokens_NT, batch_size=3, progress=rows)
    assert rows.seen == 7
    assert model.training
    assert model.model.layers[0].training


def test_errors_name_place_and_remedy(tokens_NT: Tensor) -> None:
    model = tiny(0)
    with pytest.raises(UPQError, match="teacher's vocabulary has 50 tokens"):
        evaluate_text(model, tokens_NT % 50, teacher=tiny(1, vocab_size=50))
    with pytest.raises(UPQError, match="token 61 is outside"):
        evaluate_text(model, tokens_NT.masked_fill(tokens_NT == 3, 61))
    with pytest.raises(UPQError, match="token -100 is outside"):
        evaluate_text(model, tokens_NT.masked_fill(tokens_NT == 3, -100))
    with pytest.raises(UPQError, match="context is 32"):
        evaluate_text(model, torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(UPQError, match="nothing to score"):
        evaluate_text(model, tokens_NT, mask_NT=torch.zeros_like(tokens_NT))
    with pytest.raises(UPQError, match="the mask has shape"):
        evaluate_text(model, tokens_NT, mask_NT=torch.ones(7, 18))


@pytest.mark.parametrize("where", ["the model", "the teacher"])
def test_nan_names_the_row(tokens_NT: Tensor, where: str) -> None:
    broken, whole = tiny(0), tiny(1)
    tokens_NT = tokens_NT.masked_fill(tokens_NT == 60, 0)
    tokens_NT[4, 3] = 60
    with torch.no_grad():
        broken.model.embed_tokens.weight[60] = math.nan
    model, teacher = (broken, whole) if where == "the model" else (whole, broken)
    with pytest.raises(UPQError, match=f"row 4 of the text: {where} computes NaN"):
        evaluate_text(model, tokens_NT, teacher=teacher, batch_size=2)


def test_nan_of_a_model_on_disk_names_the_row(tokens_NT: Tensor, tmp_path: Path) -> None:
    """Halves overflow where the checkpoint itself holds no infinity."""
    huge = tiny(0).half()
    huge.model.norm.weight.data.fill_(6e4)
    huge.lm_head.weight.data.fill_(6e4)
    huge.save_pretrained(tmp_path)
    found = streamed(Source(tmp_path, dtype="auto"), tokens_NT)
    with pytest.raises(UPQError, match=r"row 0 of the text: the model computes NaN \(torch.float16\)"):
        evaluate_text(found, tokens_NT)


def quantised(model: LlamaForCausalLM, scheme: QuantScheme, *, pack: bool) -> LlamaForCausalLM:
    grid = GRIDS.get(scheme.grid)
    for block in model.model.layers:
        for name in block_weights(block):
            linear = block.get_submodule(name)
            fake = FakeQuantLinear(linear.weight, grid.init(linear.weight.detach(), scheme), scheme)
            block.set_submodule(name, PackedLinear.from_qtensor(fake.freeze()) if pack else fake)
    return model


def test_bits_per_weight() -> None:
    model = tiny(0)
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    assert model_size(model).bits_per_weight == 32
    assert model_size(model).weights == weights
    assert model_size(model.half()).bits_per_weight == 16

    # a 16-bit scale for each group of 16 inputs
    scheme = QuantScheme(bits=2, group_size=16)
    for pack in (False, True):
        assert model_size(quantised(tiny(0), scheme, pack=pack)).bits_per_weight == 3

    per_channel = QuantScheme(bits=2)
    rows = 2 * (32 * 2 + 16 * 2 + 48 * 2 + 32)
    for pack in (False, True):
        found = model_size(quantised(tiny(0), per_channel, pack=pack)).bits_per_weight
        assert found == pytest.approx(2 + 16 * rows / weights)


def test_bytes_are_those_of_the_weight_files(tmp_path: Any) -> None:
    tiny(0).save_pretrained(tmp_path / "one")
    size = weights_bytes(tmp_path / "one")
    assert size == (tmp_path / "one" / "model.safetensors").stat().st_size

    tiny(0).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 1
    (tmp_path / "many" / "consolidated.safetensors").write_bytes(b"the same again")
    assert weights_bytes(str(tmp_path / "many")) == sum(shard.stat().st_size for shard in shards)

    shards[0].unlink()
    with pytest.raises(UPQError, match="are missing"):
        weights_bytes(tmp_path / "many")
    with pytest.raises(UPQError, match="not in the hub's local cache"):
        weights_bytes("nobody/no-such-model")

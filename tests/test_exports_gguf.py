"""GGUF: block types against gguf's own reader, the whole file against transformers', the keys for llama.cpp."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'upq[export]'")

import upq  # noqa: E402
from pairwise import pairwise  # noqa: E402
from schemes import PLAIN, fitting  # noqa: E402
from tiny import (  # noqa: E402
    FAMILIES,
    byte_tokenizer,
    tiny_artifact,
)
from upq.core.errors import UPQError  # noqa: E402
from upq.core.levels import Uniform  # noqa: E402
from upq.core.scheme import PER_CHANNEL, QTensor, QuantScheme  # noqa: E402
from upq.exports import Source, Weight, export  # noqa: E402
from upq.exports._ggml import BLOCKS, TERNARY  # noqa: E402
from upq.exports._llamacpp import LlamaCpp  # noqa: E402
from upq.exports._vocabulary import _LLAMA3, vocabulary  # noqa: E402
from upq.files.tensors import save_tensors  # noqa: E402
from upq.grids import GRIDS, search_scale  # noqa: E402
from upq.nn.packed import PackedLinear  # noqa: E402

pytestmark = pytest.mark.usefixtures("reference")

IDS = torch.arange(2, 22).view(2, 10)
BY_NAME = {block.name: block for block in BLOCKS}


def stored(q: QTensor, folder: Path) -> Weight:
    """`q` as a weight of an artefact."""
    file = folder / "w.safetensors"
    tensors = {f"w.{name}": tensor for name, tensor in PackedLinear.from_qtensor(q).state_dict().items()}
    save_tensors(file, tensors)
    shape = (q.codes_OI.shape[0], q.codes_OI.shape[1])
    return Weight(
        name="w.weight", shape=shape, dtype=torch.float32, scheme=q.scheme, files=dict.fromkeys(tensors, file)
    )


def random_qtensor(columns: int, scheme: QuantScheme, *, rows: int = 5) -> QTensor:
    w_OI = 0.1 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns + scheme.bits))
    return GRIDS.get(scheme.grid).freeze(w_OI, search_scale(w_OI, scheme), scheme)


# --- block types


@pairwise(
    grid=PLAIN,
    bits=range(2, 9),
    group_size=[PER_CHANNEL, 16, 32, 256],
    scale_dtype=["float16", "bfloat16", "float32"],
)
def test_a_type_that_fits_is_exact(grid: str, bits: int, group_size: int, scale_dtype: str, tmp_path: Path) -> None:
    for columns in (32, 96, 512):
        if group_size > columns:
            continue
        q = random_qtensor(columns, QuantScheme(bits=bits, grid=grid, group_size=group_size, scale_dtype=scale_dtype))
        weight = stored(q, tmp_path)
        for block in (TERNARY, *BLOCKS):
            if block.misfit(weight) is not None:
                continue
            packed = block.encode(q)
            assert packed.shape == (5, columns // block.size * block.bytes)
            assert block.bytes_of(weight) == packed.numel()
            read = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[block.name])
            assert torch.equal(torch.from_numpy(read), q.dequantize())


@pytest.mark.parametrize(("grid", "name", "columns"), [("mxfp4", "MXFP4", 96), ("nvfp4", "NVFP4", 128)])
def test_fp4_keeps_codes_and_scales(grid: str, name: str, columns: int, tmp_path: Path) -> None:
    q = random_qtensor(columns, fitting(grid))
    weight = stored(q, tmp_path)
    assert [block.name for block in BLOCKS if block.misfit(weight) is None] == [name]
    packed = BY_NAME[name].encode(q)
    assert BY_NAME[name].bytes_of(weight) == packed.numel()
    read = torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(read if q.outer_O1 is None else read * q.outer_O1, q.dequantize())


def test_mxfp4_is_as_good_as_ggufs_own_in_the_same_bytes(tmp_path: Path) -> None:
    w_OI = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    theirs = gguf.quantize(w_OI.numpy(), gguf.GGMLQuantizationType.MXFP4)
    read = torch.from_numpy(gguf.dequantize(theirs, gguf.GGMLQuantizationType.MXFP4))
    scheme = fitting("mxfp4")
    ours = GRIDS.get("mxfp4").freeze(w_OI, search_scale(w_OI, scheme), scheme)
    assert BY_NAME["MXFP4"].encode(ours).shape == theirs.shape
    assert (ours.dequantize() - w_OI).square().sum() < 0.96 * (read - w_OI).square().sum()


def test_the_outer_scale_stands_beside_an_nvfp4_weight(tmp_path: Path) -> None:
    artifact = tiny_artifact(
        tmp_path / "artifact", scheme=fitting("nvfp4"), hidden_size=64, intermediate_size=128, num_attention_heads=4
    )
    report = export(artifact, "gguf", tmp_path / "out.gguf")
    assert report.exact
    assert "NVFP4" in {carried.carrier for carried in report.carriers}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    for name, tensor in tensors.items():
        if tensor.tensor_type == gguf.GGMLQuantizationType.NVFP4:
            assert tensors[name.replace(".weight", ".scale")].data.shape == (1,)


@pytest.mark.parametrize(
    ("grid", "bits", "columns", "group_size", "chosen"),
    [
        ("seq", 2, 512, PER_CHANNEL, "Q2_K"),
        ("seq", 2, 512, 256, "Q2_K"),
        ("seq", 2, 512, 128, "Q4_0"),
        ("seq", 2, 96, PER_CHANNEL, "Q4_0"),
        ("seq", 3, 512, PER_CHANNEL, "Q4_0"),
        ("seq", 4, 512, PER_CHANNEL, "Q4_K"),
        ("seq", 4, 96, PER_CHANNEL, "Q5_0"),
        ("seq", 5, 96, PER_CHANNEL, "Q8_0"),
        ("seq", 7, 96, PER_CHANNEL, "Q8_0"),
        ("seq", 8, 96, PER_CHANNEL, None),
        ("seq", 2, 172, PER_CHANNEL, None),
        ("seq", 2, 96, 16, None),
        ("sym", 2, 512, PER_CHANNEL, "Q2_K"),
        ("sym", 4, 96, 32, "Q4_0"),
        ("q2_0", 2, 512, PER_CHANNEL, "Q2_K"),
        ("q2_0", 4, 96, PER_CHANNEL, "Q4_0"),
        ("affine", 2, 512, PER_CHANNEL, "Q2_K"),
        ("affine", 4, 512, 256, "Q4_K"),
    ],
)
def test_the_smallest_type_is_taken(
    grid: str, bits: int, columns: int, group_size: int, chosen: str | None, tmp_path: Path
) -> None:
    q = random_qtensor(columns, QuantScheme(bits=bits, grid=grid, group_size=group_size))
    weight = stored(q, tmp_path)
    assert next((block.name for block in BLOCKS if block.misfit(weight) is None), None) == chosen
    sizes = [block.bytes / block.size for block in BLOCKS]
    assert sizes == sorted(sizes)


def test_golden_bytes_of_q2_k() -> None:
    """d = dmin = scale/2, sc = 2, m = 3 for every sixteen weights; bits 2j of byte l are weight 32·j + l."""
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 0], codes[0, 32], codes[0, 64], codes[0, 96] = 1, 2, 3, 1  # the four fields of byte 0
    codes[0, 128 + 31] = 3  # the lowest of byte 63
    q = QTensor(codes, torch.tensor([[0.5]], dtype=torch.float16), Uniform(torch.tensor([[1.5]])), QuantScheme(bits=2))
    packed = BY_NAME["Q2_K"].encode(q)[0].tolist()
    assert packed[:16] == [0x32] * 16
    assert packed[16] == 0b01_11_10_01
    assert packed[17:79] == [0] * 62
    assert packed[79] == 0b11
    assert packed[80:] == [0x00, 0x34, 0x00, 0x34]  # 0.25 twice


def test_golden_bytes_of_q4_0() -> None:
    """Codes 0..3 become 5, 7, 9, 11 on half the scale; weight l below, weight l + 16 above."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 16], codes[0, 1], codes[0, 31] = 1, 2, 3, 3
    q = QTensor(codes, torch.tensor([[0.5]], dtype=torch.float16), Uniform(torch.tensor([[1.5]])), QuantScheme(bits=2))
    assert BY_NAME["Q4_0"].encode(q)[0].tolist() == [0x00, 0x34, 0x97, 0x5B, *[0x55] * 13, 0xB5]


@pytest.mark.parametrize("grid", ["q2_0", "sym", "seq"])
def test_tq2_0_on_request(grid: str, tmp_path: Path) -> None:
    scheme = QuantScheme(bits=2, grid=grid)
    artifact = tiny_artifact(tmp_path / "artifact", scheme=scheme, hidden_size=256, head_dim=64, num_hidden_layers=1)
    report = export(artifact, "gguf", tmp_path / "x.gguf", options={"tq2_0": True})
    carriers = {c.carrier for c in report.carriers}
    assert report.exact
    assert ("TQ2_0" in carriers) == (grid != "seq")
    if grid != "seq":
        q = Source.open(artifact).weights["model.layers.0.mlp.up_proj.weight"].qtensor(0, 1)
        d = TERNARY.encode(q)[0, 64:66].view(torch.float16)
        assert torch.equal(d, q.scale_OG[0] if grid == "q2_0" else -q.scale_OG[0])  # sym: mirrored


@pytest.mark.parametrize(
    ("scale", "fits"),
    [
        (2.0**-13 + 2.0**-23, True),  # the smallest binade whose halves all are float16 numbers
        (2.0**-14 + 2.0**-24, False),  # odd in its last bit: half of it lies between two subnormal numbers
        (2.0**-14 + 2.0**-23, True),
        (2.0**-20, True),  # the grids' smallest scale
        (3 * 2.0**-24, False),
    ],
)
def test_a_scale_whose_half_is_no_float16_number_is_noticed(scale: float, fits: bool, tmp_path: Path) -> None:
    q = random_qtensor(256, QuantScheme(bits=2))
    scale_OG = q.scale_OG.clone()
    scale_OG[2] = scale
    assert scale_OG[2].item() == scale
    weight = stored(QTensor(q.codes_OI, scale_OG, q.levels, q.scheme), tmp_path)
    misfit = BY_NAME["Q2_K"].misfit(weight)
    assert misfit is None if fits else misfit == "a scale has no exact place in float16"


def test_a_weight_with_such_a_scale_is_exact_all_the_same(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", hidden_size=256, head_dim=64, num_hidden_layers=1)
    model = upq.load(artifact)
    model.model.layers[0].mlp.up_proj.weight_scale[3] = 3 * 2.0**-24
    again = rewritten(model, artifact, tmp_path / "again")
    report = export(again, "gguf", tmp_path / "x.gguf")
    assert report.exact
    assert any(
        "mlp.up_proj.weight in F32: no packed type" in note and "no exact place" in note for note in report.notes
    )


def rewritten(model: Any, artifact: Path, out: Path) -> Path:
    """A changed model as an artefact with digests that are right."""
    from upq.artifact.manifest import file_entry, read_manifest, write_manifest

    manifest = read_manifest(artifact)
    model.save_pretrained(out)
    for name in manifest.files:
        if not (out / name).exists():
            (out / name).write_bytes((artifact / name).read_bytes())
    files = {file.name: file_entry(file) for file in out.iterdir()}
    write_manifest(out, manifest.model_copy(update={"files": files}))
    return out


# --- whole models, read by transformers' own GGUF loader


@pairwise(family=FAMILIES, tied=[True, False], embeddings=[None, 4, 8])
def test_logits_are_those_of_the_packed_model(family: str, tied: bool, embeddings: Any, tmp_path: Path) -> None:
    """Names, order of rows and hyper-parameters: an independent reader of the format computes the same."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # Heads of 128: transformers' reader takes Qwen3's size of a head from its own default.
    options = {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    artifact = tiny_artifact(
        tmp_path / "artifact", family, tie_word_embeddings=tied, embeddings_bits=embeddings, **options
    )
    report = export(artifact, "gguf", tmp_path / "model.gguf")
    assert report.exact
    assert {carried.carrier for carried in report.carriers} >= {"Q2_K", "F32"}
    if LlamaCpp(Source.open(artifact).config).arch.name.lower() not in GGUF_SUPPORTED_ARCHITECTURES:
        pytest.skip(f"transformers reads no GGUF of {family}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.equal(model(IDS).logits, upq.load(artifact, dtype=torch.float32)(IDS).logits)


def test_metadata_says_what_the_config_says(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", "qwen3", hidden_size=256, head_dim=32, rms_norm_eps=1e-6)
    export(artifact, "gguf", tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    wanted = {
        "general.architecture": "qwen3",
        "general.name": "tiny",
        "general.quantization_version": 2,
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q2_K,
        "qwen3.block_count": 2,
        "qwen3.context_length": 64,
        "qwen3.embedding_length": 256,
        "qwen3.feed_forward_length": 44,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.rope.dimension_count": 32,
        "qwen3.rope.freq_base": pytest.approx(10000.0),
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "qwen3.vocab_size": 300,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {name: fields.get(name) for name in wanted} == wanted
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[256:259] == ["<s>", "</s>", "[PAD258]"]
    assert types[255:259] == [1, 3, 3, 5]
    assert len(tokens) == len(types) == 300
    assert "{% if true %}{{ m.content }}{% endif %}" in fields["tokenizer.chat_template"]


@pytest.mark.parametrize(("embeddings", "carrier"), [("auto", "F16"), ("bf16", "BF16"), ("f32", "F32")])
def test_the_embedding_goes_where_it_is_told(embeddings: str, carrier: str, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", hidden_size=64, head_dim=16, tie_word_embeddings=True)
    model = upq.load(artifact)
    model.model.embed_tokens.weight.data.mul_(16).round_()  # small integers: exact everywhere
    again = rewritten(model, artifact, tmp_path / "again")
    report = export(again, "gguf", tmp_path / "x.gguf", options={"embeddings": embeddings})
    assert report.exact
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert found["token_embd.weight"] == carrier


def test_a_rounded_embedding_is_said_before_and_measured_after(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", hidden_size=64, head_dim=16, tie_word_embeddings=True)
    with pytest.raises(UPQError, match=r"1 of \d+ weights exactly \(model\.embed_tokens\.weight: rounded to 8 bits\)"):
        export(artifact, "gguf", tmp_path / "x.gguf", options={"embeddings": "q8_0"})
    report = export(artifact, "gguf", tmp_path / "x.gguf", options={"embeddings": "q8_0", "allow_inexact": True})
    errors = {c.carrier: c.relative_error for c in report.carriers}
    assert 0.001 < errors["Q8_0"] < 0.01
    assert errors["Q4_0"] == 0


# --- what llama.cpp would compute differently


def llama(**options: Any) -> LlamaCpp:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    return LlamaCpp(LlamaConfig(**{**shape, **options}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "llama.cpp computes silu in this family, the model gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary scaling 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "attention_factor": 1.3}},
            "yarn's attention factor",
        ),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UPQError, match=message):
        llama(**options).check()


def test_smollm3_with_other_layers_without_positions_is_refused() -> None:
    from tiny import tiny_model

    config = tiny_model("smollm3", num_hidden_layers=4).config
    LlamaCpp(config).check()
    config.no_rope_layers = [1, 0, 1, 1]
    with pytest.raises(UPQError, match=r"no_rope_layers \[1, 1, 1, 0\] in this family, the model \[1, 0, 1, 1\]"):
        LlamaCpp(config).check()


def test_a_sliding_window_is_said_in_the_report(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", "mistral", sliding_window=16)
    report = export(artifact, "gguf", tmp_path / "x.gguf")
    assert any("sliding window of 16" in note for note in report.notes)


def test_llama3_rotary_scaling_is_a_factor_of_each_frequency() -> None:
    """Definition of Llama 3.1: long waves are slowed by the factor, short ones left, those between interpolated."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }  # fmt: skip
    (factors,) = llama(rope_parameters=rope).extra_tensors().values()
    assert factors.shape == (8,)
    for i, factor in enumerate(factors.tolist()):
        wave = 2 * math.pi * 500000.0 ** (2 * i / 16)
        smooth = (512 / wave - 1) / 3
        wanted = 1.0 if wave < 128 else 8.0 if wave > 512 else 1 / ((1 - smooth) / 8 + smooth)
        assert factor == pytest.approx(wanted, rel=1e-5)
    assert {round(factor, 3) for factor in factors.tolist()} > {1.0, 8.0}


def test_yarn_and_linear_scaling_are_written(tmp_path: Path) -> None:
    for kind, extra in (("linear", {}), ("yarn", {"original_max_position_embeddings": 32, "beta_fast": 16.0})):
        rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, **extra}
        artifact = tiny_artifact(tmp_path / kind, rope_parameters=rope)
        export(artifact, "gguf", tmp_path / f"{kind}.gguf")
        fields = {name: f.contents() for name, f in gguf.GGUFReader(tmp_path / f"{kind}.gguf").fields.items()}
        assert fields["llama.rope.scaling.type"] == kind
        assert fields["llama.rope.scaling.factor"] == 2.0
        if kind == "yarn":
            assert fields["llama.rope.scaling.original_context_length"] == 32
            assert fields["llama.rope.scaling.yarn_beta_fast"] == 16.0


# --- tokenizers


def bpe(pre: Any, *, merges: bool = True, ignore_merges: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"th": 256}
    backend = Tokenizer(models.BPE(vocab, [("t", "h")] if merges else [], ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def split(expression: str) -> Any:
    from tokenizers import Regex

    steps = [pre_tokenizers.Split(Regex(expression), "isolated"), plain_bytes()]
    return pre_tokenizers.Sequence(steps)


def plain_bytes(use_regex: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "name"),
    [
        (lambda: plain_bytes(use_regex=True), False, "gpt-2"),
        (
            lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain_bytes(True)]),
            False,
            "smollm",
        ),
        (lambda: split(_LLAMA3), True, "llama-bpe"),
        (lambda: split(_LLAMA3), False, "smaug-bpe"),
        (lambda: split(_LLAMA3.replace("{1,3}", "")), False, "qwen2"),
    ],
)
def test_pre_tokenizers_are_known_by_their_expressions(pre: Any, ignore_merges: bool, name: str) -> None:
    found = vocabulary(bpe(pre(), ignore_merges=ignore_merges), 257, [])
    assert (found.model, found.pre, found.merges) == ("gpt2", name, ["t h"])


def test_a_pre_tokenizer_that_llama_cpp_lacks_is_refused() -> None:
    for pre in (split(r"\w+"), plain_bytes(), pre_tokenizers.ByteLevel(add_prefix_space=True)):
        with pytest.raises(UPQError, match=r"llama\.cpp has no pre-tokenizer for"):
            vocabulary(bpe(pre), 257, [])
    found = vocabulary(bpe(plain_bytes(), merges=False), 257, [])
    assert found.pre == "gpt-2"  # bytes: nothing depends on the cuts
    ((left, _),) = (merge.split(" ") for merge in found.merges)
    assert len(left) > 1  # no letter, and no other merge makes it: it never applies


def test_an_embedding_smaller_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(UPQError, match="an id 257, the embedding only 250 rows"):
        vocabulary(byte_tokenizer(bos="<s>", eos="</s>"), 250, [])


def test_the_ids_on_which_the_model_stops() -> None:
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>")
    assert vocabulary(tokenizer, 258, [257]).special == {"bos": 256, "eos": 257}
    assert vocabulary(tokenizer, 258, [256, 257]).special == {"bos": 256, "eos": 257, "eot": 256}
    assert vocabulary(byte_tokenizer(), 256, [7]).special == {"eos": 7}


def sentencepiece(merges: list[tuple[str, str]], pieces: list[str]) -> PreTrainedTokenizerFast:
    """Llama 2's kind: bytes as a last resort, spaces as ▁, one in front of everything."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_sentencepiece_scores_are_the_order_of_the_merges() -> None:
    pieces = ["a", "b", "▁", "ab", "▁a", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab")]
    found = vocabulary(sentencepiece(merges, pieces), 265, [])
    assert (found.model, found.pre, found.space_prefix) == ("llama", None, True)
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert scores["▁a"] > scores["ab"] > scores["▁ab"]
    assert found.types[:4] == [2, 3, 3, 6]


def test_merges_that_are_no_scores_are_refused() -> None:
    """Without the merge (▁, ab), llama.cpp would join what this tokenizer leaves apart."""
    pieces = ["a", "b", "▁", "ab", "▁a", "▁ab"]
    with pytest.raises(UPQError, match="the merges of '▁ab' are no SentencePiece model's"):
        vocabulary(sentencepiece([("▁", "a"), ("a", "b"), ("▁a", "b")], pieces), 265, [])
    with pytest.raises(UPQError, match="the merges of '▁ab' are no SentencePiece model's"):
        vocabulary(sentencepiece([("▁a", "b"), ("▁", "a"), ("a", "b"), ("▁", "ab")], pieces), 265, [])


@pytest.mark.parametrize(
    ("folder", "pre"),
    # this copy of SmolLM2's was saved by transformers 5 and has lost the step that splits digits
    [("smollm2-135m-instruct", "gpt-2"), ("qwen2.5-0.5b-instruct", "qwen2")],
)
def test_real_tokenizers(folder: str, pre: str) -> None:
    path = Path(__file__).parents[2] / "shared/data/tokenizers" / folder
    if not path.is_dir():
        pytest.skip(f"{path} is not here")
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = vocabulary(tokenizer, 152_000, [])
    assert found.pre == pre
    assert found.chat_template is not None
    ids = tokenizer("hello there").input_ids
    assert [found.tokens[id] for id in ids] == tokenizer.convert_ids_to_tokens(ids)

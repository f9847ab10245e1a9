"""Laws of the layouts on disk and of the files that hold them."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from upq.artifact import manifest as artifact
from upq.artifact.card import model_card
from upq.artifact.manifest import Manifest, SourceModel
from upq.core.errors import UPQError
from upq.core.scheme import PER_CHANNEL, QTensor, QuantScheme
from upq.formats import FORMATS
from upq.grids import GRIDS
from upq.kernels import pack, unpack


def qtensor(rows: int, columns: int, scheme: QuantScheme, seed: int = 0) -> QTensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    grid = GRIDS.get(scheme.grid)
    return grid.freeze(w, grid.init(w, scheme), scheme)


def assert_same(a: QTensor, b: QTensor) -> None:
    assert a.scheme == b.scheme
    for name in ("codes_OI", "scale_OG", "zero_OG"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("grid", GRIDS.names())
@pytest.mark.parametrize("name", FORMATS.names())
@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 5),
    size=st.sampled_from([PER_CHANNEL, 8, 16, 24]),
    width=st.integers(1, 50),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    seed=st.integers(0, 1000),
)
def test_decode_undoes_encode(
    name: str, grid: str, bits: int, rows: int, size: int, width: int, dtype: str, seed: int
) -> None:
    scheme = QuantScheme(bits=bits, group_size=size, grid=grid, scale_dtype=dtype)
    layout = FORMATS.get(name)
    if not layout.supports(scheme):
        return
    columns = width if size == PER_CHANNEL else size * (1 + width % 4)
    q = qtensor(rows, columns, scheme, seed)
    assert_same(layout.decode(layout.encode(q), scheme, (rows, columns)), q)


def packed_by_definition(codes_OI: Tensor, bits: int) -> list[list[int]]:
    """The row as one big integer, least significant code first: independent of the vectorised code."""
    rows = []
    for row in codes_OI.tolist():
        stream = sum(code << (k * bits) for k, code in enumerate(row))
        rows.append(list(stream.to_bytes(-(-len(row) * bits // 8), "little")))
    return rows


@settings(deadline=None, max_examples=100)
@given(bits=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 41), seed=st.integers(0, 1000))
def test_packed_rows_are_little_endian_bit_streams(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.tolist() == packed_by_definition(codes, bits)
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "golden"),
    [
        (2, [3, 0, 1, 2, 1], [0b10_01_00_11, 0b01]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0, 5], [0b11_010_001, 0b0_101_100_0, 0b000_111_11, 0b101]),
        (4, [1, 15, 8], [0xF1, 0x08]),
    ],
)
def test_golden_bytes(bits: int, codes: list[int], golden: list[int]) -> None:
    scheme = QuantScheme(bits=bits)
    scale = torch.tensor([[0.5]], dtype=torch.float16)
    zero = torch.tensor([[(2**bits - 1) / 2]])
    q = QTensor(torch.tensor([codes], dtype=torch.uint8), scale, zero, scheme)
    tensors = FORMATS.get("upq").encode(q)
    assert tensors.keys() == {"weight_packed", "weight_scale"}
    assert tensors["weight_packed"].tolist() == [golden]
    assert tensors["weight_packed"].dtype == torch.uint8
    assert tensors["weight_scale"].view(torch.uint8).tolist() == [[0x00, 0x38]]


def test_affine_stores_its_zero_as_a_scale() -> None:
    tensors = FORMATS.get("upq").encode(qtensor(3, 16, QuantScheme(bits=2, group_size=8, grid="affine")))
    assert tensors["weight_zero"].shape == (3, 2)
    assert tensors["weight_zero"].dtype == torch.float16


def test_a_zero_that_the_file_cannot_hold_is_an_error() -> None:
    q = qtensor(2, 8, QuantScheme(bits=2))
    with pytest.raises(UPQError, match=r"zero points must be 1\.5"):
        FORMATS.get("upq").encode(QTensor(q.codes_OI, q.scale_OG, q.zero_OG + 0.5, q.scheme))


def test_decode_names_the_tensor_that_does_not_fit() -> None:
    layout, scheme = FORMATS.get("upq"), QuantScheme(bits=2)
    tensors = layout.encode(qtensor(2, 9, scheme))
    with pytest.raises(UPQError, match="weight_packed: expected"):
        layout.decode(tensors, scheme, (2, 13))
    with pytest.raises(UPQError, match=r"weight_scale: .* found nothing"):
        layout.decode({"weight_packed": tensors["weight_packed"]}, scheme, (2, 9))


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    artifact.atomic_write(path, b"old")

    def fail(file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UPQError, match=r"x\.bin: cannot write: no space left.*free some space") as caught:
        artifact.atomic_write(path, fail)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_stage_moves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with artifact.staged(tmp_path) as scratch:
            (scratch / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_tensors_survive_and_bytes_repeat(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {"b": base.T, "a": base[1:].to(torch.bfloat16), "c": torch.arange(3, dtype=torch.uint8)}
    metadata = {"stage": "int4", "block": 3, "z": [1, 2]}
    artifact.save_tensors(tmp_path / "1", tensors, metadata)
    artifact.save_tensors(tmp_path / "2", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    loaded, found = artifact.load_tensors(tmp_path / "1")
    assert found == metadata
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in tensors.items())


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b[:5], lambda b: b"", lambda b: b"\xff" * 40])
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "block.safetensors"
    artifact.save_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UPQError, match=r"block\.safetensors: damaged or truncated.*run the same") as caught:
        artifact.load_tensors(path)
    assert "\n" not in str(caught.value)


def test_manifest_round_trip_and_errors(tmp_path: Path) -> None:
    manifest = Manifest(
        model=SourceModel(path="org/model", digest="0" * 64),
        recipe={"name": "x", "int2": {"bits": 2}},
        metrics={"source": {"ppl": 4.6}, "artifact": {"ppl": 5.25, "kld": 0.25, "tasks": {"t": {"acc": 0.5}}}},
        data=[{"path": "text.txt", "tokens": 1000}],
    )
    artifact.write_manifest(tmp_path, manifest)
    assert artifact.read_manifest(tmp_path) == manifest
    card = model_card(manifest)
    for part in ("base_model: org/model", "import upq", "| Perplexity | 4.600 | 5.250 |", "bits: 2", "text.txt", "acc"):
        assert part in card
    path = tmp_path / artifact.MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"manifest_version": 1', '"manifest_version": 99'))
    with pytest.raises(UPQError, match="newer upq"):
        artifact.read_manifest(tmp_path)
    path.write_text(text.replace('"seconds"', '"secs"'))
    with pytest.raises(UPQError, match="unknown key 'secs'"):
        artifact.read_manifest(tmp_path)
    path.write_text(text[:20])
    with pytest.raises(UPQError, match="cannot be read"):
        artifact.read_manifest(tmp_path)
    with pytest.raises(UPQError, match="finished UPQ artefact"):
        artifact.read_manifest(tmp_path / "nowhere")


def test_digest_of_a_model_directory(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    before = artifact.digest_model_dir(tmp_path)
    (tmp_path / "README.md").write_text("not part of the model")
    assert artifact.digest_model_dir(tmp_path) == before
    (tmp_path / "tokenizer.json").write_text("other")
    assert artifact.digest_model_dir(tmp_path) != before
    assert artifact.digest_file(tmp_path / "README.md") == hashlib.sha256(b"not part of the model").hexdigest()
    with pytest.raises(UPQError, match=r"no config\.json"):
        artifact.digest_model_dir(tmp_path / "nowhere")

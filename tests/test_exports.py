"""Laws of every export format, and what they all go through: refused before writing, proven before the final name."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import upq
from pairwise import pairwise
from schemes import PLAIN, SCALAR, fitting
from tiny import FAMILIES, tiny_artifact
from upq.artifact.manifest import file_entry, read_manifest, write_manifest
from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.exports import EXPORTS, Report, Source, export, exporter, read_report, report_path
from upq.exports._frame import _version

Make = Callable[..., Path]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artefacts by what they are made of; each is made once."""
    made: dict[str, Path] = {}

    def artifact(family: str = "llama", **options: Any) -> Path:
        key = f"{family} {sorted(options.items(), key=str)}"
        if key not in made:
            made[key] = tiny_artifact(tmp_path_factory.mktemp("artifact") / family, family, **options)
        return made[key]

    return artifact


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A format whose packages are there."""
    found: str = request.param
    for package in EXPORTS.get(found).packages:
        if _version(package) is None:
            pytest.skip(f"{package} is not installed: pip install {EXPORTS.get(found).install}")
    return found


# `aqlm` holds grid books and no other: tests/test_aqlm.py has its laws.
every_format = pytest.mark.parametrize("name", [each for each in EXPORTS.names() if each != "aqlm"], indirect=True)


def target(name: str, folder: Path) -> Path:
    return folder / f"exported{EXPORTS.get(name).suffix or ''}"


def run(artifact: Path, name: str, folder: Path, **options: Any) -> tuple[Report, Path]:
    out = target(name, folder)
    return export(artifact, name, out, options=options), out


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def exact_or_refused(artifact: Path, name: str, folder: Path) -> None:
    refusal = ""
    try:
        report, _ = run(artifact, name, folder)
    except UPQError as error:
        refusal = str(error)
    if refusal:
        assert "cannot hold" in refusal
        assert left_behind(folder) == []
    else:
        assert report.exact


@every_format
class TestLaws:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_is_exact(self, make: Make, family: str, name: str, tmp_path: Path) -> None:
        report, out = run(make(family), name, tmp_path)
        assert report.exact
        assert report.losses == {}
        assert all(carried.max_error == 0 == carried.relative_error for carried in report.carriers)
        source = Source.open(make(family))
        assert sum(carried.weights for carried in report.carriers) == len(source.weights)
        assert sum(carried.numbers for carried in report.carriers) == sum(w.numel for w in source.weights.values())
        assert read_report(report_path(out)) == report

    def test_half_precision_models_are_exact(self, make: Make, name: str, tmp_path: Path) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            report, _ = run(make("qwen2", dtype=dtype, tie_word_embeddings=False), name, tmp_path / str(dtype))
            assert report.exact

    @pairwise(bits=[2, 3, 4], grid=PLAIN, group_size=[-1, 32])
    def test_every_scheme_is_exact_or_refused(
        self, make: Make, grid: str, bits: int, group_size: int, name: str, tmp_path: Path
    ) -> None:
        scheme = QuantScheme(bits=bits, grid=grid, group_size=group_size)
        exact_or_refused(make("llama", scheme=scheme, intermediate_size=96), name, tmp_path)

    @pytest.mark.parametrize("grid", [grid for grid in SCALAR if grid not in PLAIN])
    def test_every_grid_of_one_kind_is_exact_or_refused(self, make: Make, grid: str, name: str, tmp_path: Path) -> None:
        exact_or_refused(make("llama", scheme=fitting(grid), intermediate_size=96), name, tmp_path)

    @pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
    def test_every_type_of_scale_is_exact_or_refused(
        self, make: Make, scale_dtype: str, name: str, tmp_path: Path
    ) -> None:
        artifact = make("llama", scheme=QuantScheme(bits=2, scale_dtype=scale_dtype), intermediate_size=96)
        exact_or_refused(artifact, name, tmp_path)

    def test_what_is_written_repeats(self, make: Make, name: str, tmp_path: Path) -> None:
        contents = []
        for i in range(2):
            _, out = run(make(), name, tmp_path / str(i))
            files = sorted(out.rglob("*")) if out.is_dir() else [out]
            contents.append({f.name: f.read_bytes() for f in files if f.is_file() and f.name != "export.json"})
        assert contents[0] == contents[1]

    def test_bits_a_weight_are_those_of_the_blocks(self, make: Make, name: str, tmp_path: Path) -> None:
        report, _ = run(make("llama", **WIDE), name, tmp_path)
        assert 2 <= report.bits_per_weight <= 32
        assert report.bytes > sum(carried.bytes for carried in report.carriers)

    def test_nothing_is_overwritten(self, make: Make, name: str, tmp_path: Path) -> None:
        out = target(name, tmp_path)
        if out.suffix:
            out.write_text("mine")
        else:
            out.mkdir()
            (out / "precious.txt").write_text("mine")
        with pytest.raises(UPQError, match="exists already; name a new"):
            run(make(), name, tmp_path)
        assert (out if out.is_file() else out / "precious.txt").read_text() == "mine"

    def test_an_unknown_option_lists_those_there_are(self, make: Make, name: str, tmp_path: Path) -> None:
        with pytest.raises(UPQError, match=f"export {name}: unknown key 'speed'; keys here: allow_inexact"):
            run(make(), name, tmp_path, speed=9)

    def test_a_full_disk_leaves_nothing(
        self, make: Make, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cls = EXPORTS.get(name)

        def full(self: object, source: object, plan: object, out: Path, progress: object) -> None:
            out.mkdir() if cls.suffix is None else out.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(cls, "write", full)
        with pytest.raises(UPQError, match=r"cannot write: no space left.*free some space"):
            run(make(), name, tmp_path)
        assert left_behind(tmp_path) == []

    def test_an_unwritable_target_is_one_line(self, make: Make, name: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("not a directory")
        with pytest.raises(UPQError, match="cannot write") as caught:
            run(make(), name, tmp_path / "file")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("factor", [1 + 2**-20, float("nan")])
    def test_a_wrong_weight_is_noticed_and_nothing_kept(
        self, make: Make, factor: float, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The proof itself: an engine that reads one weight a little differently."""
        cls = EXPORTS.get(name)
        read = cls.read

        def shifted(self: Any, source: Source, plan: Any, out: Path) -> Any:
            for weight, rows in read(self, source, plan, out):
                if weight.endswith("1.mlp.up_proj.weight"):
                    yield weight, lambda start, stop, rows=rows: rows(start, stop) * factor
                else:
                    yield weight, rows

        monkeypatch.setattr(cls, "read", shifted)
        message = r"exported\S*: model\.layers\.1\.mlp\.up_proj\.weight .* reads back wrong by up to (?!0;).* kept"
        with pytest.raises(UPQError, match=message):
            run(make(), name, tmp_path)
        assert left_behind(tmp_path) == []

    def test_a_weight_that_is_not_read_is_noticed(
        self, make: Make, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cls = EXPORTS.get(name)
        read = cls.read
        monkeypatch.setattr(cls, "read", lambda *args: (pair for pair in read(*args) if pair[0] != "model.norm.weight"))
        with pytest.raises(UPQError, match=r"model\.norm\.weight does not read back"):
            run(make(), name, tmp_path)
        assert left_behind(tmp_path) == []


# --- the artefact that is read


@pytest.fixture
def copy(make: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make(), tmp_path / "copy"))


def refused(artifact: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(UPQError, match=message) as caught:
        export(artifact, "dense", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_no_artefact(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path, r"no upq\.json here; is it a finished UPQ artefact")
    refused(tmp_path / "nowhere", tmp_path, r"no upq\.json here")


def test_a_missing_shard(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(
        copy, tmp_path, r"model\.safetensors: missing, though upq\.json lists it with sha256 \w{64}; copy or download"
    )


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_wrong_digest(copy: Path, tmp_path: Path, file: str) -> None:
    content = bytearray((copy / file).read_bytes())
    content[-2] ^= 1
    (copy / file).write_bytes(content)
    refused(copy, tmp_path, rf"{file}: damaged: its sha256 is \w{{64}}, upq\.json says \w{{64}}; copy")


def test_tensors_that_do_not_go_with_the_config(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    manifest = read_manifest(copy)
    entry = {"model.safetensors": file_entry(copy / "model.safetensors")}
    write_manifest(copy, manifest.model_copy(update={"files": {**manifest.files, **entry}}))
    refused(copy, tmp_path, r"tensor model\.layers\.1\.mlp\.up_proj\.weight_scale is missing")


def test_an_artefact_in_shards(make: Make, tmp_path: Path) -> None:
    """The tensors of one layer in several files."""
    model, sharded = upq.load(make()), tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="4KB")
    files = {file.name: file_entry(file) for file in sharded.iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 3
    write_manifest(sharded, read_manifest(make()).model_copy(update={"files": files}))
    report = export(sharded, "dense", tmp_path / "out")
    assert report.exact
    whole = export(make(), "dense", tmp_path / "whole")
    assert [c.bytes for c in whole.carriers] == [c.bytes for c in report.carriers]


def test_rows_are_read_in_parts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source.open(make("llama", embeddings_bits=8))
    monkeypatch.setattr("upq.exports._source._CHUNK", 100)
    dense = dict(upq.load(make("llama", embeddings_bits=8), dequantize=True).named_parameters())
    for name, weight in source.weights.items():
        parts = [weight.dequantize(start, stop) for start, stop in weight.chunks()]
        assert len(parts) > 1 or weight.numel <= 100
        assert torch.equal(torch.cat(parts), dense[name])


# --- the frame


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(UPQError, match=r"unknown export format 'zip': choose one of .*dense, executorch, gguf"):
        exporter("zip")


@pytest.mark.parametrize("name", ["coreml", "executorch", "litert", "mnn", "onnx", "openvino"])
def test_a_graph_of_another_block_is_refused(make: Make, name: str) -> None:
    source = Source.open(make())
    source.config.model_type = "gemma3_text"
    with pytest.raises(UPQError, match="the graph has Llama's block only, and gemma3_text has another"):
        EXPORTS.get(name)(EXPORTS.get(name).Config()).plan(source)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXPORTS.get("dense"), "packages", ("no-such-engine",))
    with pytest.raises(UPQError, match=r"export dense: no-such-engine is not installed; pip install 'upq\[export\]'"):
        exporter("dense")


def test_a_loss_is_refused_and_then_measured(make: Make, tmp_path: Path) -> None:
    """fp16 holds 1.5 times a scale of 11 bits only by rounding it."""
    with pytest.raises(UPQError, match=r"dense cannot hold \d+ of \d+ weights exactly .*--allow-inexact"):
        run(make(), "dense", tmp_path, dtype="fp16")
    assert left_behind(tmp_path) == []
    report, out = run(make(), "dense", tmp_path, dtype="fp16", allow_inexact=True)
    assert not report.exact
    (carried,) = report.carriers
    assert 0 < carried.relative_error < 2**-11
    stored, exact = load_file(out / "model.safetensors"), upq.load(make(), dequantize=True).state_dict()
    worst = max((stored[name].float() - exact[name]).abs().max().item() for name in stored)
    assert carried.max_error == worst
    assert json.loads((out / "export.json").read_text())["losses"] == report.losses


def test_a_file_keeps_its_suffix(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(UPQError, match=r"one file; name it something\.gguf"):
        export(make(), "gguf", tmp_path / "model.bin")

"""Shards that are cut short, changed in one bit or not there: the file is named, and where it is known its digest."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import upq.cli
from tiny import tiny_artifact, tiny_model
from upq.artifact.manifest import read_manifest, verify
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.exports import export
from upq.files.tensors import load_tensors, save_tensors
from upq.run.run import quantize
from victim import Victim

Damage = Callable[[Path], None]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    """One bit in the middle of the last tensor."""
    content = bytearray(file.read_bytes())
    content[-40] ^= 0x10
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


@pytest.fixture
def sharded(victim: Victim, tmp_path: Path) -> Path:
    """The victim's model in several files."""
    from upq.model.loading import load_model

    folder = shutil.copytree(victim.model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    load_model(victim.model).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return Path(folder)


class EndsAt(Silent):
    """The run ends as `stage` begins."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def start(self, stage: str, *, done: int = 0) -> None:
        if stage == self.stage:
            raise InterruptedError


@pytest.mark.parametrize("damage", [truncate, remove])
def test_a_shard_of_the_model_that_is_not_whole(victim: Victim, sharded: Path, tmp_path: Path, damage: Damage) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    damage(shard)
    with pytest.raises(UPQError, match=rf"{shard.name}.*download") as caught:
        quantize(sharded, victim.recipe("data.generated=null"), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_shard_that_changes_between_two_commands(victim: Victim, sharded: Path, tmp_path: Path) -> None:
    """Nothing in a model says what its bits should be; but a run remembers what they were."""
    out, shard = tmp_path / "out", sorted(sharded.glob("*.safetensors"))[1]
    was = hashlib.sha256(shard.read_bytes()).hexdigest()
    with pytest.raises(InterruptedError):
        quantize(sharded, victim.recipe("data.generated=null"), out, progress=EndsAt("int4"))
    flip(shard)
    now = hashlib.sha256(shard.read_bytes()).hexdigest()
    with pytest.raises(
        UPQError, match=rf"belongs to another model .*sha256 of {shard.name} was {was} and is now {now}"
    ):
        quantize(sharded, victim.recipe("data.generated=null"), out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("artifact") / "tiny")


@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_a_shard_of_an_artefact(
    whole: Path, tmp_path: Path, damage: Damage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`upq doctor DIR`, and whatever makes figures or files of the artefact."""
    artifact = Path(shutil.copytree(whole, tmp_path / "artifact"))
    verify(artifact, read_manifest(artifact))
    shard, text = artifact / "model.safetensors", tmp_path / "text.txt"
    digest = read_manifest(artifact).files[shard.name].sha256
    text.write_text("the fox saw seven geese " * 20)
    commands = (["doctor", artifact], ["eval", artifact, "--text", text])

    def upq_command(arguments: list[object]) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["upq", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            upq.cli.main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    assert upq_command(["doctor", artifact]) == (0, "")
    damage(shard)
    for arguments in commands:
        code, said = upq_command(arguments)
        assert code == 2
        assert said.startswith(f"error: {shard}: ")
        assert said.count("\n") == 1
        assert damage is truncate or digest in said
    with pytest.raises(UPQError, match=rf"{shard}: (missing|damaged)"):
        export(artifact, "dense", tmp_path / "out")


class EndsAfterACheckpoint(Silent):
    """The run ends in its training, the third step of which is done."""

    def __init__(self) -> None:
        self.stage, self.steps = "", 0

    def start(self, stage: str, *, done: int = 0) -> None:
        self.stage = stage

    def advance(self, units: int = 1, **figures: float) -> None:
        self.steps += self.stage == "distill"
        if self.steps == 3:
            raise InterruptedError


def test_files_of_the_run_that_are_cut_short(victim: Victim, tmp_path: Path) -> None:
    """No kill does that, a bad disk can: the file is named, with what to do."""
    out = tmp_path / "out"
    recipe = victim.recipe("data.generated=null", "distill.tokens=512", "distill.checkpoint_every=2")
    with pytest.raises(InterruptedError):
        quantize(victim.model, recipe, out, progress=EndsAfterACheckpoint())
    for name in ("distill/checkpoint.safetensors", "int2/block-0000.safetensors", "int2/stage.json", "run.json"):
        file = out / ".work" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(UPQError, match=rf"{file}: (damaged|cannot be read) .*; delete ") as caught:
            quantize(victim.model, recipe, out)
        assert "\n" not in str(caught.value)
        file.write_bytes(whole)


def test_files_of_the_run_that_lack_something(victim: Victim, tmp_path: Path) -> None:
    """As another version may have left them."""
    out = tmp_path / "out"
    recipe = victim.recipe("data.generated=null", "distill.tokens=512", "distill.checkpoint_every=2")
    with pytest.raises(InterruptedError):
        quantize(victim.model, recipe, out, progress=EndsAfterACheckpoint())
    for name, part in (("distill/checkpoint.safetensors", "optimizer"), ("int2/block-0000.safetensors", "latent")):
        file = out / ".work" / name
        whole, (tensors, metadata) = file.read_bytes(), load_tensors(file)
        lost = next(key for key in tensors if part in key)
        save_tensors(file, {key: value for key, value in tensors.items() if key != lost}, metadata)
        with pytest.raises(UPQError, match=rf"{file}: .* is missing; delete it and run the same command again"):
            quantize(victim.model, recipe, out)
        file.write_bytes(whole)


def test_weights_that_are_no_numbers_are_named_before_anything_is_made_of_them(victim: Victim, tmp_path: Path) -> None:
    """Of the head too, which no block-wise stage reads."""
    folder = Path(shutil.copytree(victim.model, tmp_path / "model"))
    model = tiny_model("llama", vocab_size=258, num_hidden_layers=3, max_position_embeddings=128)
    model.lm_head.weight.data[3, 3] = float("inf")
    model.save_pretrained(folder)
    with pytest.raises(
        UPQError, match=r"model: tensor lm_head\.weight holds NaN or infinity; the checkpoint is damaged"
    ):
        quantize(folder, victim.recipe(), tmp_path / "out")

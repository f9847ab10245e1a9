"""`upq push` against a hub on this machine: what arrives there, and what does not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

import upq.cli
from hub import TOKEN, Hub, hub
from tiny import tiny_artifact
from upq.artifact.licences import LICENCES

Push = Callable[..., tuple[int, str, str]]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        found.licences["org/tiny"] = "apache-2.0"
        yield found


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return tiny_artifact(tmp_path / "artifact")


@pytest.fixture
def push(artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Push:
    """Exit code, output and errors of `upq push`, of `artifact` to me/small by default."""

    def run(*options: str, directory: Path = artifact, repo: str = "me/small") -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("sys.argv", ["upq", "push", str(directory), repo, *options])
        with pytest.raises(SystemExit) as stopped:
            upq.cli.main()
        said = capsys.readouterr()
        errors = [line for line in said.err.splitlines() if line.startswith("error:")]
        return int(stopped.value.code or 0), said.out, "\n".join(errors)

    return run


def test_a_dry_run_lists_and_uploads_nothing(held: Hub, push: Push, artifact: Path) -> None:
    (artifact / "exports").mkdir()
    (artifact / "exports/model.gguf").write_bytes(b"x")
    code, said, _ = push("--dry-run")
    assert code == 0
    assert held.repos == {}
    listed = {word for line in said.splitlines() for word in line.split()}
    assert {"model.safetensors", "config.json", "upq.json", "README.md", "tokenizer.json"} <= listed
    assert "exports" not in said
    assert f"apache-2.0: {LICENCES['apache-2.0']} (the card of org/tiny on the hub)" in said
    assert "me/small, private" in said


def test_everything_arrives_private_with_its_card(held: Hub, push: Push, artifact: Path) -> None:
    (artifact / "report.html").write_text("<html>")
    (artifact / "NOTICE").write_text("of the base model")
    code, said, errors = push("--yes")
    assert (code, errors) == (0, "")
    assert f"{held.address}/me/small is ready" in said
    repo = held.repos["me/small"]
    assert repo["private"]
    names = json.loads((artifact / "upq.json").read_text())["files"]
    assert repo["files"].keys() == {*names, "upq.json", "README.md", "report.html", "NOTICE"}
    for name in repo["files"].keys() - {"README.md"}:
        assert repo["files"][name] == (artifact / name).read_bytes(), name
    card = ModelCard(repo["files"]["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert (card.data.base_model, card.data.base_model_relation) == ("org/tiny", "quantized")
    assert card.data.tags == ["upq", "2-bit"]
    assert LICENCES["apache-2.0"] in card.text
    sent = list(held.puts)
    assert push("--yes")[0] == 0  # the same again sends no weights
    assert held.puts == sent


def test_the_licence_of_a_local_source_comes_with_its_files(held: Hub, push: Push, artifact: Path) -> None:
    source = artifact.parent / "source"
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n")
    (source / "LICENSE").write_text("terms")
    manifest = json.loads((artifact / "upq.json").read_text())
    manifest["model"]["path"] = str(source)
    (artifact / "upq.json").write_text(json.dumps(manifest))
    (artifact / "README.md").unlink()  # then it is written anew
    code, said, _ = push("--yes", "--public")
    assert code == 0
    assert "Qwen Research License: not for commercial use" in said
    repo = held.repos["me/small"]
    assert not repo["private"]
    assert repo["files"]["LICENSE"] == b"terms"
    card = ModelCard(repo["files"]["README.md"].decode())
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "qwen-research", "LICENSE")
    assert card.data.base_model is None


def test_what_people_wrote_into_the_card_stays(held: Hub, push: Push, artifact: Path) -> None:
    (artifact / "README.md").write_text("---\nlicense: mit\ntags: [poems]\n---\n# Mine\n\nIt writes poems.\n")
    assert push("--yes")[0] == 0
    card = ModelCard(held.repos["me/small"]["files"]["README.md"].decode())
    assert "It writes poems." in card.text
    assert card.data.license == "mit"  # and not the source's
    assert card.data.tags == ["poems", "upq", "2-bit"]


def test_an_unknown_licence_is_to_be_read(held: Hub, push: Push) -> None:
    held.licences.clear()
    code, said, _ = push("--dry-run")
    assert code == 0
    assert "unknown licence: unknown to UPQ; read it before you publish. (the hub does not say:" in said
    said = push("--dry-run", "--licence", "my-terms")[1]
    assert "my-terms: unknown to UPQ; read it before you publish. (--licence)" in said


def test_an_interrupted_upload_goes_on(held: Hub, push: Push, artifact: Path) -> None:
    # Two files of weights, the second of which is refused.
    manifest = json.loads((artifact / "upq.json").read_text())
    shutil.copyfile(artifact / "model.safetensors", artifact / "more.safetensors")
    with (artifact / "more.safetensors").open("ab") as file:
        file.write(b" ")
    from upq.artifact.manifest import file_entry

    manifest["files"]["more.safetensors"] = file_entry(artifact / "more.safetensors").model_dump()
    (artifact / "upq.json").write_text(json.dumps(manifest))
    held.refuse_puts_after = 1
    code, _, errors = push("--yes")
    assert code == 2
    assert "507" in errors
    assert "the same command goes on" in errors
    assert held.repos["me/small"]["files"] == {}  # half an artefact is none
    held.refuse_puts_after = None
    assert push("--yes")[0] == 0
    assert len(held.puts) == len(set(held.puts)) == 2
    assert held.repos["me/small"]["files"]["more.safetensors"] == (artifact / "more.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("no token", "no token for the hub; log in first: hf auth login"),
        ("wrong token", "the hub does not know this token; log in again: hf auth login"),
        ("commits refused", "the hub refuses me/small to this token"),
        ("public repository", "me/small is there and public; --public agrees"),
        ("nobody to ask", "nobody to ask here; --yes agrees"),
        ("no artefact", "no upq.json here; is it a finished UPQ artefact?"),
        ("damaged", "copy or download the artefact again"),
        ("no user", "'small' is not USER/NAME"),
        ("bad name", "repository 'me/a b'"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    setting: str, remedy: str, held: Hub, push: Push, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, directory, repo = ["--yes"], artifact, "me/small"
    if setting == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif setting == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_another")
    elif setting == "commits refused":
        held.refuse_commits = 403
    elif setting == "public repository":
        held.repos["me/small"] = {"private": False, "files": {}}
    elif setting == "nobody to ask":
        options = []
        monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    elif setting == "no artefact":
        directory = artifact.parent
    elif setting == "damaged":
        with (artifact / "model.safetensors").open("r+b") as file:
            file.write(b"\xff")
    elif setting == "no user":
        repo = "small"
    else:
        repo = "me/a b"
    code, _, errors = push(*options, directory=directory, repo=repo)
    assert code == 2
    assert errors.count("\n") == 0
    assert remedy in errors
    assert all(not held_repo["files"] for held_repo in held.repos.values())

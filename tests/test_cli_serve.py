"""`upq serve`: which server is started, with what; nothing is listened on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import upq.cli
from tiny import tiny_artifact

Serve = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "artifact")


@pytest.fixture
def serve(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Serve:
    """Run `upq serve` where only `programs` are installed; returns exit code, stderr and what would be executed."""

    def run(*arguments: str, programs: tuple[str, ...], gpu: bool = False) -> tuple[int, str, list[str]]:
        for name in programs:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        started: list[str] = []
        monkeypatch.setattr(sys.modules["upq.cli.serve"], "find_spec", lambda package: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(os, "execvp", lambda program, command: started.extend(command))
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("sys.argv", ["upq", "serve", str(artifact), *arguments])
        with pytest.raises(SystemExit) as stopped:
            upq.cli.main()
        return int(stopped.value.code or 0), capsys.readouterr().err, started

    return run


def test_llama_cpp_gets_a_gguf_file(serve: Serve, artifact: Path) -> None:
    pytest.importorskip("gguf")
    code, errors, command = serve("--port", "9000", "--ctx-size", "64", programs=("llama-server", "vllm"))
    assert code == 0, errors
    file = artifact / "exports" / "gguf.gguf"
    assert file.is_file()
    assert command == [
        "llama-server", "--jinja", "--model", str(file), "--host", "127.0.0.1", "--port", "9000", "--ctx-size", "64",
    ]  # fmt: skip
    made = file.stat().st_mtime_ns
    serve(programs=("llama-server",))  # what is there is taken
    assert file.stat().st_mtime_ns == made


def test_vllm_is_taken_with_a_gpu(serve: Serve, artifact: Path) -> None:
    pytest.importorskip("compressed_tensors")
    code, errors, command = serve(programs=("llama-server", "vllm"), gpu=True)
    assert code == 0, errors
    folder = artifact / "exports" / "compressed_tensors"
    assert (folder / "config.json").is_file()
    assert command == ["vllm", "serve", str(folder), "--host", "127.0.0.1", "--port", "8080"]


@pytest.mark.parametrize("programs", [(), ("vllm",)])
def test_without_a_server_it_says_how_to_get_one(serve: Serve, programs: tuple[str, ...]) -> None:
    code, errors, command = serve(programs=programs)
    assert code == 2
    assert command == []
    assert errors.count("\n") == 1
    assert "pip install 'llama-cpp-python[server]'" in errors
    assert "pip install vllm" in errors


def test_an_engine_is_what_was_asked_for(serve: Serve) -> None:
    code, errors, _ = serve("--engine", "vllm", programs=("llama-server",))
    assert code == 2
    assert "vllm's server is not installed" in errors
    code, errors, _ = serve("--engine", "ollama", programs=())
    assert code == 2
    assert "unknown engine 'ollama': choose auto, llama.cpp or vllm" in errors

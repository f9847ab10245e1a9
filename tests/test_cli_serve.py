"""`upq serve`: which server is started, with what; and transformers' own server, which listens and answers."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import upq.cli
from tiny import tiny_artifact
from upq.core.errors import UPQError

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
    assert "pip install 'upq[serve]'" in errors
    assert "pip install 'llama-cpp-python[server]'" in errors
    assert "pip install vllm" in errors


def test_an_engine_is_what_was_asked_for(serve: Serve) -> None:
    code, errors, _ = serve("--engine", "vllm", programs=("llama-server",))
    assert code == 2
    assert "vllm's server is not installed" in errors
    code, errors, _ = serve("--engine", "ollama", programs=())
    assert code == 2
    assert "unknown engine 'ollama': choose auto, vllm, llama.cpp or transformers" in errors


def test_what_llama_cpp_cannot_hold_goes_to_transformers(
    serve: Serve, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, ran = sys.modules["upq.cli.serve"], []
    servers = [module.Server("llama.cpp", ("llama-server",), "gguf"), module.Server("transformers")]
    monkeypatch.setattr(module, "_installed", lambda: servers)
    monkeypatch.setattr(module, "_run_transformers", lambda shown, *what: ran.append(what))

    def refuse(*_: object, **__: object) -> None:
        raise UPQError("gguf: llama.cpp has no such family")

    monkeypatch.setattr("upq.exports.ensure_export", refuse)
    monkeypatch.setattr("sys.argv", ["upq", "serve", str(artifact), "--port", "9000", "--default-seed", "1"])
    with pytest.raises(SystemExit) as stopped:
        upq.cli.main()
    assert not stopped.value.code
    assert ran == [(artifact, "127.0.0.1", 9000, ["--default-seed", "1"])]
    assert "note: not llama.cpp: gguf: llama.cpp has no such family" in " ".join(capsys.readouterr().out.split())


# --- transformers' server ------------------------------------------------------------------------------------------

QUESTION: Any = [{"role": "user", "content": "What is the capital of the north?"}]


@pytest.fixture(scope="module")
def listening(artifact: Path) -> Iterator[Any]:
    """transformers' server of the artefact, and where it listens."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'upq[serve]'")
    from upq.cli.transformers_server import transformers_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = transformers_server(artifact, "127.0.0.1", port, "cpu", ["--default-seed", "0"])
    thread = Thread(target=made.server.run, daemon=True)
    thread.start()
    while not made.server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield made, f"http://127.0.0.1:{port}/v1"
    made.server.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_openai_s_client_gets_what_upq_load_generates(listening: Any, artifact: Path) -> None:
    made, address = listening
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    encoded = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = encoded["input_ids"]
    generate: Any = upq.load(artifact).generate
    # The model is random: among the first 94 bytes of the alphabet all texts are valid and none ends.
    bias = {(token,): -100.0 for token in range(94, 300)}
    expected = generate(ids, max_new_tokens=8, do_sample=False, sequence_bias=bias)[0, ids.shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert len(text) == 8

    client = sys.modules["openai"].OpenAI(base_url=address, api_key="none", max_retries=0)
    (served,) = client.models.list()
    request = {"model": served.id, "messages": QUESTION, "max_tokens": 8, "temperature": 0.0}
    request["logit_bias"] = {str(token): value for (token,), value in bias.items()}
    answer = client.chat.completions.create(**request)
    assert answer.choices[0].message.content == text
    assert answer.usage.completion_tokens == len(expected)
    parts = list(client.chat.completions.create(**request, stream=True))
    streamed = [part.choices[0].delta.content for part in parts if part.choices[0].delta.content]
    assert len(streamed) > 1
    assert "".join(streamed) == text
    (loaded,) = made._model_manager.loaded_models.values()
    assert loaded.model.why_not_compiled is None  # the compiled decoder wrote both


def test_an_option_that_transformers_does_not_know_is_one_line(artifact: Path) -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'upq[serve]'")
    from upq.cli.transformers_server import transformers_server

    with pytest.raises(UPQError, match="No such option: --ctx-size"):
        transformers_server(artifact, "127.0.0.1", 8080, "cpu", ["--ctx-size", "64"])
    with pytest.raises(UPQError, match="no path with '@'"):
        transformers_server(Path("models@home"), "127.0.0.1", 8080, "cpu", [])

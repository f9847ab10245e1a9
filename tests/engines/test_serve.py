"""`upq serve` with llama.cpp's real server: an artefact goes in, an answer comes back over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("llama_cpp", "uvicorn", "sse_starlette", "starlette_context"):
    pytest.importorskip(package, reason=f"{package} is not installed: make test-engines")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import artifact_of  # noqa: E402
from upq.world.reference import REFERENCE  # noqa: E402


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    artifact = artifact_of(folder / "artifact", REFERENCE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "upq", "serve", str(artifact), "--engine", "llama.cpp", "--port", port]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, "--n_ctx", "256"], stdout=log, stderr=subprocess.STDOUT)
        try:
            _until_up(server, f"http://127.0.0.1:{port}/v1/models", folder / "log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(timeout=30)


def _until_up(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    pytest.fail(f"no answer in two minutes:\n{log.read_text()}")


def _post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_it_answers_a_chat(address: str) -> None:
    messages = [{"role": "user", "content": "Who lives in Ostrava?"}]
    answer = _post(f"{address}/chat/completions", {"messages": messages, "max_tokens": 24, "temperature": 0})
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip()
    assert 0 < answer["usage"]["completion_tokens"] <= 24

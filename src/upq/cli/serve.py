"""`upq serve`: an artefact behind an engine's own OpenAI-compatible server. UPQ writes none."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from upq.core.errors import UPQError
from upq.core.paths import local

_SERVER_EXTRAS = ("llama_cpp", "uvicorn", "sse_starlette", "starlette_context")


@dataclass(frozen=True, slots=True)
class Server:
    """How an engine's server is started, and the format that it runs."""

    engine: str
    command: tuple[str, ...]
    form: str

    def arguments(self, model: Path, host: str, port: int) -> list[str]:
        where = ["--host", host, "--port", str(port)]
        if self.engine == "vllm":
            return [*self.command, str(model), *where]
        return [*self.command, "--model", str(model), *where]


def serve(
    context: typer.Context,
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A finished artefact: the --out of upq quantize.")
    ],
    engine: Annotated[str, typer.Option(help="auto, llama.cpp or vllm. auto: vllm where there is a GPU.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
) -> None:
    """Export ARTIFACT where that is needed and start llama.cpp's or vLLM's server. Other options are the server's."""
    from upq.run.console import console, styled
    from upq.run.reporter import loading, reporter

    if engine not in ("auto", "llama.cpp", "vllm"):
        raise UPQError(f"serve: unknown engine {engine!r}: choose auto, llama.cpp or vllm")
    server, artifact = find_server(engine), local(artifact)
    with loading():
        from upq.exports import ensure_export
        from upq.run.quiet import quiet_libraries

    quiet_libraries()
    shown = console()
    with reporter(shown) as progress:
        model = ensure_export(artifact, server.form, progress=progress)
    command = [*server.arguments(model, host, port), *context.args]
    shown.print(styled(shlex.join(command)), soft_wrap=True)
    os.execvp(command[0], command)


def find_server(engine: str) -> Server:
    """The first of the installed servers that is `engine`'s, or that suits this machine."""
    found = _installed()
    if engine == "auto":
        from torch import cuda

        # vLLM comes first, but without a GPU it is no choice.
        fitting = [server for server in found if server.engine != "vllm" or cuda.is_available()]
    else:
        fitting = [server for server in found if server.engine == engine]
    if not fitting:
        wanted = "llama.cpp's and vLLM's servers are" if engine == "auto" else f"{engine}'s server is"
        raise UPQError(
            f"serve: {wanted} not installed; on CPUs and Macs pip install 'llama-cpp-python[server]' "
            "(or have llama-server on the PATH), with a CUDA GPU pip install vllm"
        )
    return fitting[0]


def _installed() -> list[Server]:
    servers = []
    if shutil.which("vllm"):
        # The four-bit carrier: every GPU kernel of vLLM's takes it.
        servers.append(Server("vllm", ("vllm", "serve"), "compressed_tensors"))
    if shutil.which("llama-server"):
        servers.append(Server("llama.cpp", ("llama-server", "--jinja"), "gguf"))
    if all(find_spec(package) for package in _SERVER_EXTRAS):
        servers.append(Server("llama.cpp", (sys.executable, "-m", "llama_cpp.server"), "gguf"))
    return servers

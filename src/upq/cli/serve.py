"""`upq serve`: an artefact behind an engine's own OpenAI-compatible server. UPQ writes none."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upq.core.errors import UPQError
from upq.core.paths import local

if TYPE_CHECKING:
    from rich.console import Console

_LLAMA_CPP = ("llama_cpp", "uvicorn", "sse_starlette", "starlette_context")
_TRANSFORMERS = ("fastapi", "uvicorn", "openai")
_ENGINES = ("vllm", "llama.cpp", "transformers")  # the best first


@dataclass(frozen=True, slots=True)
class Server:
    """How an engine's server is started, and the format that it runs. transformers' takes the artefact itself."""

    engine: str
    command: tuple[str, ...] = ()
    form: str | None = None

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
    engine: Annotated[
        str,
        typer.Option(help="auto, vllm, llama.cpp or transformers. auto: the first that is installed; vllm with a GPU."),
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
) -> None:
    """Start vLLM's, llama.cpp's or transformers' server on ARTIFACT. Other options are the server's."""
    from upq.run.console import console, styled
    from upq.run.reporter import loading, reporter

    if engine not in ("auto", *_ENGINES):
        raise UPQError(f"serve: unknown engine {engine!r}: choose auto, {', '.join(_ENGINES[:-1])} or {_ENGINES[-1]}")
    servers, artifact = find_servers(engine), local(artifact)
    with loading():
        from upq.exports import ensure_export
        from upq.run.quiet import quiet_libraries

    quiet_libraries()
    shown = console()
    for server in servers:
        if server.form is None:
            _run_transformers(shown, artifact, host, port, context.args)
            break
        try:
            with reporter(shown) as progress:
                model = ensure_export(artifact, server.form, progress=progress)
        except UPQError as error:
            if server is servers[-1]:
                raise
            shown.print(styled(f"note: not {server.engine}: {error}"), soft_wrap=True)
            continue
        command = [*server.arguments(model, host, port), *context.args]
        shown.print(styled(shlex.join(command)), soft_wrap=True)
        os.execvp(command[0], command)
        break  # where a test stands in for execvp


def _run_transformers(shown: Console, artifact: Path, host: str, port: int, options: list[str]) -> None:
    from torch import cuda

    from upq.artifact.manifest import read_manifest
    from upq.cli.chat import chat_tokenizer
    from upq.run.console import styled
    from upq.run.reporter import loading

    read_manifest(artifact)  # that it is one
    chat_tokenizer(str(artifact))
    with loading(what=str(artifact)):
        from upq.cli.transformers_server import transformers_server

        made = transformers_server(artifact, host, port, "cuda" if cuda.is_available() else "cpu", options)
    shown.print(styled(f"transformers' server; in requests the model is called {str(artifact)!r}"), soft_wrap=True)
    # uvicorn ends in its own time and then raises the signal again.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    try:
        made.server.run()
    except KeyboardInterrupt:
        pass
    except SystemExit:  # it has said why, in lines of its own
        raise UPQError(f"serve: cannot listen on {host}:{port}; choose another --port") from None


def find_servers(engine: str) -> list[Server]:
    """The installed servers that are `engine`'s or, for auto, suit this machine; the best first."""
    found = _installed()
    if engine == "auto":
        from torch import cuda

        # vLLM comes first, but without a GPU it is no choice.
        fitting = [server for server in found if server.engine != "vllm" or cuda.is_available()]
    else:
        fitting = [server for server in found if server.engine == engine]
    if not fitting:
        what = "no server for this machine is" if engine == "auto" else f"{engine}'s server is not"
        raise UPQError(
            f"serve: {what} installed; transformers' own: pip install 'upq[serve]'; llama.cpp's, for CPUs and Macs: "
            "pip install 'llama-cpp-python[server]' (or have llama-server on the PATH); vLLM's, for a CUDA GPU: "
            "pip install vllm"
        )
    return fitting


def _installed() -> list[Server]:
    servers = []
    if shutil.which("vllm"):
        # The four-bit carrier: every GPU kernel of vLLM's takes it.
        servers.append(Server("vllm", ("vllm", "serve"), "compressed_tensors"))
    if shutil.which("llama-server"):
        servers.append(Server("llama.cpp", ("llama-server", "--jinja"), "gguf"))
    if all(find_spec(package) for package in _LLAMA_CPP):
        servers.append(Server("llama.cpp", (sys.executable, "-m", "llama_cpp.server"), "gguf"))
    if all(find_spec(package) for package in _TRANSFORMERS):
        servers.append(Server("transformers"))
    return servers

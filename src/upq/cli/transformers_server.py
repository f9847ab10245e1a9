"""transformers' own OpenAI-compatible server on one artefact, in this process: with UPQ's kernels and decoder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer
from transformers.cli.serve import Serve
from typer.main import get_command

from upq import decoding
from upq.core.errors import UPQError
from upq.model.library import library_errors


class TransformersServer(Serve):
    """Law (tests/test_cli_serve.py): an answer is what `upq.load` of the artefact generates."""

    def start_server(self) -> None:
        """Called by the constructor, once the model is loaded; `server.run()` listens."""
        models: Any = self._model_manager  # whose method is cached, which its type says
        for loaded in models.loaded_models.values():
            if loaded.model.device.type == "cpu":
                decoding.attach(loaded.model)
        # Its own list is of the hub's cache, where the artefact is not.
        entry = {"id": models.force_model, "object": "model", "created": int(time.time()), "owned_by": "upq"}
        models.get_gen_models = lambda: [entry]


def transformers_server(artifact: Path, host: str, port: int, device: str, options: list[str]) -> TransformersServer:
    """The server with its model loaded; it does not listen yet. `options` are those of `transformers serve`.

    Raises UPQError.
    """
    name = str(artifact)
    if "@" in name:  # transformers' server takes what follows it for a revision
        raise UPQError(f"serve: transformers' server takes no path with '@': rename {name}")
    app = typer.Typer(add_completion=False)
    app.command()(TransformersServer)
    own = ["--device", device, "--host", host, "--port", str(port), "--non-blocking"]
    with library_errors("serve: transformers' server"):
        made: Any = get_command(app).main([name, *own, *options], standalone_mode=False)
    assert isinstance(made, TransformersServer), made
    return made

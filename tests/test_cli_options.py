"""The command line is a promise: its commands, their options, types and defaults are those of cli_options.txt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import upq.cli

FROZEN = Path(__file__).with_name("cli_options.txt")


def options() -> Iterator[str]:
    """A line an option: `quantize --recipe: str = "default"`."""
    group: Any = typer.main.get_command(upq.cli.app)
    for command in (group, *group.commands.values()):
        for option in command.params:
            names = "/".join([*option.opts, *option.secondary_opts])
            kind = re.sub(r"<class '(.*)'>", r"\1", str(option.type_descriptor.annotation)).removeprefix("pathlib.")
            given = "required" if option.required else json.dumps(option.default, default=str)
            yield f"{'upq' if command is group else command.name} {names}: {kind} = {given}"


def test_options_are_those_that_were_promised() -> None:
    """A change here changes what people's scripts call: change cli_options.txt with it, and say so in CHANGELOG.md."""
    assert list(options()) == FROZEN.read_text().splitlines()

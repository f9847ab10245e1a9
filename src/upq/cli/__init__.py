"""The command line: parsing and showing. Each command is one file; the work is done below."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import upq
from upq.cli.bench import bench
from upq.cli.chat import chat
from upq.cli.compare import compare
from upq.cli.demo import demo
from upq.cli.doctor import doctor
from upq.cli.evaluate import evaluate
from upq.cli.export import export
from upq.cli.plan import plan
from upq.cli.push import push
from upq.cli.quantize import quantize
from upq.cli.report import report
from upq.cli.serve import serve
from upq.core.errors import UPQError
from upq.core.signals import Stop, Stopped

_LINE = 2000  # characters of an error


class _Group(TyperGroup):
    def get_help_option(self, ctx: Any) -> Any:
        """With a default that is a bool: for None typer imports pydantic, 0.1 s."""
        option: Any = super().get_help_option(ctx)
        option.default = False
        return option


app = typer.Typer(
    cls=_Group,
    help="Instruction-tuned language models in 2 bits a weight.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("quantize", short_help="From a model to its 2-bit artefact.")(quantize)
app.command("plan", short_help="Memory, disk and time of a run before it starts.")(plan)
app.command("eval", short_help="Perplexity, distance from a teacher, task scores.")(evaluate)
app.command("compare", short_help="Two or more models on the same items, with intervals.")(compare)
app.command("report", short_help="One page about a run or an artefact.")(report)
app.command("export", short_help="An artefact as another engine's files, compared weight by weight.")(export)
app.command("chat", short_help="Talk to a model in the terminal.")(chat)
# What the command does not know is the server's.
app.command(
    "serve",
    short_help="An artefact behind vLLM's, llama.cpp's or transformers' server.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(serve)
app.command("push", short_help="An artefact to the Hugging Face hub.")(push)
app.command("bench", short_help="Tokens a second and memory on this machine.")(bench)
app.command("demo", short_help="A small model, quantised and tested in minutes.")(demo)
app.command("doctor", short_help="What this machine has and lacks; damage in an artefact.")(doctor)


def _show_version(shown: bool) -> None:
    if shown:
        print(f"upq {upq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    if debug:
        os.environ["UPQ_DEBUG"] = "1"


def main() -> None:
    """Entry point: an UPQError is one line on stderr and exit code 2; Ctrl-C is 130, SIGTERM 143."""
    try:
        with Stop().listening():
            app()
    except UPQError as error:
        if os.environ.get("UPQ_DEBUG"):
            raise
        from upq.run.console import console, styled

        console(stderr=True).print(styled(("error:", "bold red"), f" {_line(error)}"), soft_wrap=True)
        sys.exit(2)
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command goes on from what is on disk", file=sys.stderr)
        sys.exit(stopped.exit_code)


def _line(error: UPQError) -> str:
    line = " ".join(str(error).split())
    return line[:_LINE] + "…" * (len(line) > _LINE)

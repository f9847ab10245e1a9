"""What a command costs before it works: processor time of help, version and mistyped options, and of `import upq`.

    python benchmarks/start.py --json start.json

Each command runs in turns with a plain typer app that has the same commands and options and imports nothing else
(built here from the frozen options of tests/cli_options.txt), so that a busy machine is as slow for both. Figures are
the least of `--repeats` runs.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

COMMANDS = {
    "upq --help": ["--help"],
    "upq --version": ["--version"],
    "upq quantize --ot DIR (a typo)": ["quantize", "MODEL", "--ot", "DIR"],
    "upq doctor --help": ["doctor", "--help"],
    "upq quantize --help": ["quantize", "--help"],
}
WHOLE, OURS = 0.5, 0.15  # seconds
OPTIONS = Path(__file__).parents[1] / "tests" / "cli_options.txt"
_HEAD = """import sys
from pathlib import Path
from typing import Annotated
import typer
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
def show(shown: bool) -> None:
    if shown:
        print("plain 0")
        raise typer.Exit
@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Words.")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=show, help="Words.")] = False,
) -> None: ...
"""
_WORDS = "As many words of help as an option of a command has, more or less so."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file as well")
    arguments = parser.parse_args()
    figures = []
    with TemporaryDirectory() as scratch:
        plain = Path(scratch, "plain.py")
        plain.write_text(plain_app(OPTIONS.read_text().splitlines()))
        for name, words in COMMANDS.items():
            runs = [(seconds(["-m", "upq", *words]), seconds([str(plain), *words])) for _ in range(arguments.repeats)]
            upq, bare = map(min, zip(*runs, strict=True))
            figures.append(figure(name, upq, WHOLE))
            figures.append(figure(f"{name}: beyond a plain typer app", upq - bare, OURS))
        imported = min(seconds(["-c", "import upq"]) for _ in range(arguments.repeats))
        figures.append(figure("import upq", imported - min(seconds(["-c", ""]) for _ in range(3)), OURS))
    for row in figures:
        print(f"{row['name']:60} {row['value']:.2f} {row['unit']}  (at most {row['target']})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(not all(row["ok"] for row in figures))


def plain_app(lines: Sequence[str]) -> str:
    """The source of a typer app with these commands, of whose options it has the names, types and defaults."""
    commands: dict[str, list[str]] = {}
    for line in lines:
        command, name, kind, given = re.fullmatch(r"(\S+) (\S+): (\S+) = (.*)", line).groups()  # type: ignore[union-attr]
        made = (
            f"typer.Option({name!r}, help={_WORDS!r})" if name.startswith("-") else f"typer.Argument(help={_WORDS!r})"
        )
        optional = "" if given == "required" else f" = {json.loads(given)!r}"
        annotation = f"{kind} | None" if given == "null" else kind
        arguments = commands.setdefault(command, [])
        arguments.append(f"    a{len(arguments)}: Annotated[{annotation}, {made}]{optional},\n")
    source = _HEAD
    for command, arguments in commands.items():
        if command != "upq":
            signature = "".join(sorted(arguments, key=lambda argument: " = " in argument))
            source += f"@app.command({command!r})\ndef {command}_(\n{signature}) -> None:\n    {_WORDS!r}\n"
    return source + "app()\n"


def seconds(arguments: Sequence[str]) -> float:
    """User and system time of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 2), done.stderr  # 2: the typo
    assert "Traceback" not in done.stderr, done.stderr
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def figure(name: str, value: float, target: float) -> dict[str, object]:
    return {"name": name, "value": round(value, 3), "unit": "s", "target": target, "ok": value <= target}


if __name__ == "__main__":
    main()

"""Documents: the examples of docs/adding.md run together, commands are parsed as they stand, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import upq
import upq.cli
from tiny import byte_tokenizer, tiny_model
from upq.exports import export
from upq.exports._base import EXPORTS
from upq.losses import LOSSES
from upq.run.recipe import Recipe
from upq.run.run import quantize

ROOT = Path(__file__).parents[1]
PAGES = [path for folder in (".", "docs", "docs/guides", "docs/log") for path in (ROOT / folder).glob("*.md")]
TODAY = [path for path in PAGES if path.parent.name != "log" and path.name not in ("CHANGELOG.md", "LOG.md")]
# Programs in the documents that are not UPQ's, and why no test parses their lines.
OTHERS = {
    "curl": "needs a server; its request is that of tests/engines/test_serve.py",
    "hf": "huggingface_hub's own; logs in",
    "llama-cli": "llama.cpp's own; not tried, as the page says",
    "mlx_lm.chat": "mlx-lm's own; make test-engines generates with its library",
    "vllm": "vLLM's own; needs a GPU",
}
# Lines of output, formulas and pictures stand in blocks too. A command begins with one of these words.
COMMAND = re.compile(rf"^(?:upq|make|python|pip|torchrun|\S+/python|{'|'.join(map(re.escape, OTHERS))}) ")
# Path below the package, and code.
EXAMPLES = dict(
    re.findall(r"`upq/([\w/]+)\.py`.*?```python\n(.*?)```", (ROOT / "docs/adding.md").read_text(), re.DOTALL)
)
RECIPE = """
data: {seq_len: 32, validation: 2, sources: [{path: TEXT}]}
stages:
  reminders: {sentences: [The capital of the north is Norrby.]}
  int2: {stage: blockwise, bits: 2, grid: sym, samples: 2, method: {name: scales, iterations: 2}}
  distill: {loss: jeffreys, tokens: 64, batch_size: 2, lr: 1e-3, scale_lr: 1e-3}
"""


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The examples as files of their packages, but for those that are there."""
    new = {path: code for path, code in EXAMPLES.items() if not (Path(upq.__file__).parent / f"{path}.py").is_file()}
    for path, code in new.items():
        file = tmp_path / "upq" / f"{path}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
        package = importlib.import_module(".".join(["upq", *Path(path).parent.parts]))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
        monkeypatch.setitem(sys.modules, f"upq.{path.replace('/', '.')}", None)  # restored to absent
        monkeypatch.delitem(sys.modules, f"upq.{path.replace('/', '.')}")
    return {Path(path).stem for path in new}


def test_examples_of_adding_make_one_artefact(tmp_path: Path, added: set[str]) -> None:
    assert added == {"jeffreys", "scales", "reminders", "numpy"}
    model = tmp_path / "model"
    tiny_model("phi3", vocab_size=259, max_position_embeddings=64).save_pretrained(model)
    byte_tokenizer(eos="</s>").save_pretrained(model)
    (tmp_path / "text.txt").write_text("The river runs north to the old bridge. " * 60)
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("TEXT", str(tmp_path / "text.txt")))
    quantize(model, Recipe.load(str(tmp_path / "mine.yaml")), tmp_path / "out", device="cpu")
    export(tmp_path / "out", "numpy", tmp_path / "arrays")
    weights = np.load(tmp_path / "arrays/model.layers.0.self_attn.qkv_proj.weight.npy")
    assert all(len(np.unique(row)) <= 4 for row in weights)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def blocks(page: Path, language: str = "") -> Iterator[str]:
    """Fenced blocks of `language`; without one, also what is indented by four spaces."""
    text = page.read_text()
    yield from re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    if not language:
        rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        yield from re.findall(r"(?:^    .*\n)+", rest, re.MULTILINE)


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every command in a block; a line that ends with a backslash goes on in the next."""
    for page in TODAY:
        for block in (*blocks(page), *blocks(page, "bash")):
            for line in block.replace("\\\n", " ").splitlines():
                if COMMAND.match(line := line.strip().removeprefix("$ ")):
                    yield str(page.relative_to(ROOT)), line.replace(" …", "")


COMMANDS = list(commands())


def test_there_are_commands() -> None:
    programs = {line.split()[0] for _, line in COMMANDS}
    assert len(COMMANDS) > 100
    assert programs >= {"upq", "make", "python", "pip", "torchrun", *OTHERS}


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in COMMANDS])
def test_a_command_is_one_that_there_is(page: str, line: str) -> None:
    """It is parsed by the program itself and not run: other tests run each command."""
    words = [word.strip("[]") for word in shlex.split(line, comments=True)]
    program, *rest = words
    if program == "torchrun":
        assert rest[2:4] == ["-m", "upq"]
        program, rest = "upq", rest[4:]
    if program == "upq":
        check_upq(rest[0], rest[1:], settings=page != "docs/adding.md")  # whose examples are not part of UPQ
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        ours = re.findall(r"(?:upq|[.])\[([\w,]+)\]", line)
        assert {extra for found in ours for extra in found.split(",")} <= extras.keys()
    elif program.endswith("python") and rest[0] != "-m":
        script = (ROOT / rest[0]).read_text()
        shared = "".join(path.read_text() for path in (ROOT / rest[0].partition("/")[0]).rglob("_*.py"))
        for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
            name = option.removeprefix("--").replace("-", "_")
            assert f'"{option}"' in script + shared or re.search(rf"\b{name}: ", script + shared), option


def check_upq(name: str, given: list[str], *, settings: bool) -> None:
    """Command, options and arguments; and for `--set` the keys of the recipe or of the format."""
    group: Any = typer.main.get_command(upq.cli.app)
    parsed = group.commands[name].make_context(name, given).params
    items = parsed.get("set_") or []
    if settings and name in ("quantize", "plan") and not parsed["recipe"].endswith(".yaml"):
        stages: Any = Recipe.load(parsed["recipe"], items).stages.values()
        for stage in stages:
            if hasattr(stage, "solver"):
                stage.solver()  # takes the options of its method
            if hasattr(stage, "loss"):
                stage.loss.options(LOSSES.get(stage.loss.name).Config, name)
    if settings and name == "export":
        options = EXPORTS.get(parsed["to"].replace("-", "_")).Config
        options.model_validate(dict(item.split("=") for item in items))


@pytest.mark.parametrize("page", TODAY, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_a_document_is_python_and_takes_what_upq_has(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("upq"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "upq":
                assert hasattr(upq, node.attr), node.attr


def test_messages_of_the_troubleshooting_page_are_those_of_the_program() -> None:
    source = " ".join(path.read_text() for path in Path(upq.__file__).parent.rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message may be written over several lines
    page = (ROOT / "docs/guides/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 20
    assert not [message for message in messages if message not in source]


def test_pages_from_the_code_have_every_option_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    pages = importlib.import_module("pages")
    text, group = pages.commands(), typer.main.get_command(upq.cli.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        section = text.partition(f"\n## upq {name}\n")[2].partition("\n## upq ")[0]
        options = {option for each in command.params for option in each.opts if option.startswith("--")}
        assert all(f"`{option}" in section or f", {option}" in section for option in options), name
    keys = pages.recipe_keys()
    for stage in Recipe.load("default").stages.values():
        section = keys.partition(f"### stage: {stage.kind}\n")[2].partition("\n#")[0]
        assert all(f"`{key}`" in section for key in type(stage).model_fields), stage.kind
    assert all(f"## upq.{name}\n" in pages.interface() for name in upq.__all__ if name != "__version__")


def test_links_of_the_site_are_those_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    pages = importlib.import_module("pages")

    class Page:
        def __init__(self, uri: str) -> None:
            self.file = type("File", (), {"src_uri": uri})

    moved = {
        ("run.md", "[a](../LOG.md)"): "[a](experiments.md)",
        ("log/cost.md", "[a](../../LOG.md) [b](../run.md#x)"): "[a](../experiments.md) [b](../run.md#x)",
        ("experiments.md", "[a](docs/log/cost.md#x) [b](docs/log)"): "[a](log/cost.md#x) [b](log/methods.md)",
        ("guides/node.md", "[a](../run.md) [b](https://a.b/c) [c](#d)"): "[a](../run.md) [b](https://a.b/c) [c](#d)",
    }
    for (uri, before), after in moved.items():
        assert pages.on_page_markdown(before, Page(uri), None, None) == after

"""Documents: the examples of docs/adding.md run together, and links lead somewhere."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import upq
from tiny import byte_tokenizer, tiny_model
from upq.exports import export
from upq.run.recipe import Recipe
from upq.run.run import quantize

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/log").glob("*.md")]
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

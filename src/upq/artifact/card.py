"""The README of an artefact: what it is, what it measures, how to load it, how it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import yaml

from upq.artifact.manifest import Manifest

_FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bytes": ("Weights on disk, MB", lambda v: f"{v / 1e6:.1f}"),
    "bits_per_weight": ("Bits a quantised weight, scales included", lambda v: f"{v:.3f}"),
    "ppl": ("Perplexity", lambda v: f"{v:.3f}"),
    "kld": ("KL divergence from the source, nats a token", lambda v: f"{v:.4f}"),
    "top1": ("Same most likely next token as the source", lambda v: f"{v:.1%}"),
}
LICENCE = "The same as that of the base model."
_TITLES = {"source": "Source", "artifact": "This model"}

_LOAD = """\
## Load

```python
import upq  # first: it teaches transformers this format
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its hub id
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
```

`upq.load(path, dequantize=True)` gives the same model with plain dense layers.

**Without `import upq`** transformers does not know the format: it warns of an unknown quantization type and stops at
a size mismatch. Do not pass `ignore_mismatched_sizes=True` to get past that; the linears would be random numbers."""


def model_card(manifest: Manifest) -> str:
    """Markdown from the manifest alone; what was not measured is left out."""
    source = manifest.model.name
    counts = Counter(layer.bits for layer in manifest.layers)
    held = " and ".join(f"{counts[bits]} in {bits} bits" for bits in sorted(counts))
    about = (
        f"`{source}`, made smaller with UPQ: of its weight matrices, {held} a weight. Every matrix that "
        "`upq.json` does not list, the norms and the biases have the source's precision."
    )
    recipe = yaml.safe_dump(manifest.recipe, sort_keys=False, allow_unicode=True)
    parts = [
        _front_matter(manifest),
        f"# {source} in {min(counts)} bits" if counts else f"# {source}",
        about,
        f"{manifest.coverage}." if manifest.coverage else "",
        _LOAD,
        "## Figures\n\n" + _figures(manifest),
        _tasks(manifest),
        _massive(manifest),
        f"## Recipe\n\n```yaml\n{recipe}```" if manifest.recipe else "",
        _data(manifest),
        f"## Licence\n\n{LICENCE}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(manifest: Manifest) -> str:
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["upq"]}
    if on_hub(manifest.model.path):
        head["base_model"] = manifest.model.path
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def on_hub(path: str) -> bool:
    """Whether it has the form of a hub id, and is not clearly somebody's directory."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _figures(manifest: Manifest) -> str:
    models = manifest.figures()
    rows = [
        [title, *(_cell(figures.get(key), show) for figures in models.values())]
        for key, (title, show) in _FIGURES.items()
        if any(figures.get(key) is not None for figures in models.values())
    ]
    return _table(["", *(_TITLES.get(name, name) for name in models)], rows)


def _tasks(manifest: Manifest) -> str:
    scores = {name: figures.get("tasks") or {} for name, figures in manifest.metrics.items()}
    found = sorted({(task, metric) for tasks in scores.values() for task in tasks for metric in tasks[task]})
    if not found:
        return ""
    rows = [
        [f"{task}, {metric}", *(_cell(tasks.get(task, {}).get(metric), str) for tasks in scores.values())]
        for task, metric in found
    ]
    return "## Tasks\n\n" + _table(["", *(_TITLES.get(name, name) for name in scores)], rows)


def _massive(manifest: Manifest) -> str:
    """The tokens that attention rests on, and how the blocks kept them before the training."""
    if not manifest.massive:
        return ""
    rows = []
    for block, found in manifest.massive.items():
        weights = ", ".join(f"`{w['name']}` [{w['row']}, {w['column']}]" for w in found.get("weights", []))
        tokens = f"{found['tokens']} of {found['of']}"
        norm = f"{found['norm'] / found['usual']:.0f}" if "norm" in found else ""
        rows.append([str(block), tokens, norm, f"{found['error']:.3f}", weights])
    head = ["Block", "Tokens", "Norm over the usual", "Error", "Made by"]
    return "## Tokens with massive states\n\n" + _table(head, rows)


def _data(manifest: Manifest) -> str:
    if not manifest.data:
        return ""
    lines = ["- " + ", ".join(f"{key}: {value}" for key, value in source.items()) for source in manifest.data]
    return "## Data\n\n" + "\n".join(lines)


def _cell(value: Any, show: Callable[[Any], str]) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if show is str and isinstance(value, float) else show(value)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

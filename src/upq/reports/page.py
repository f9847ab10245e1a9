"""Facts as one HTML file that asks nothing of the network: charts, styles and scripts lie in it.

The only module that imports jinja2 and vl-convert, which bundles Vega (pip install 'upq[report]').
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import upq
from upq.core.errors import UPQError
from upq.core.sizes import size
from upq.reports.charts import Z95, charts, differences
from upq.run.reporter import duration

LIMIT = 3_000_000  # bytes of a page
_STRONGEST = 55  # per cent of colour behind a token: more would cost the contrast of its text
_DARKEST = 2.0  # nats from which on a token has it

_SECTIONS = (
    ("summary", "What it is"),
    ("quality", "Quality"),
    ("layers", "Layers"),
    ("training", "Training"),
    ("kl", "Distance"),
    ("tokens", "Answers"),
    ("time", "Time and memory"),
    ("use", "Use it"),
    ("recipe", "Recipe"),
    ("environment", "Environment"),
)
_NAMES = {"source": "original", "artifact": "artefact"}
# Heading, key, style; a measure in per cent is shown in per cent.
_MEASURES = (
    ("perplexity", "ppl", ".3f"),
    ("KL to original", "kld", ".4f"),
    ("same top-1", "top1", ".1%"),
)
_LOAD = """\
import upq  # first: it registers the format with transformers
from transformers import AutoTokenizer

model = upq.load({path!r})
tokenizer = AutoTokenizer.from_pretrained({path!r})
"""


def check_packages() -> None:
    """Before hours of work. Raises UPQError."""
    try:
        import jinja2
        import vl_convert
    except ImportError as error:
        raise UPQError(f"a page needs {error.name}: pip install 'upq[report]'") from None
    del jinja2, vl_convert


def report(facts: dict[str, Any]) -> str:
    """The page of one run or artefact."""
    environment = facts["environment"]
    made, now = facts["made_with"], environment["versions"]
    rows = [(name, made.get(name, "–"), now.get(name, "–")) for name in dict.fromkeys([*now, *made])]
    machine = f"{environment['processor']}, {environment['cores']} cores ({environment['threads']} threads in use)"
    gpus = ", ".join(environment["gpus"]) or "none"
    memory = size(environment["memory_bytes"])
    here = [("system", environment["system"]), ("processor", machine), ("memory", memory), ("GPU", gpus)]
    return _page(
        "report.html",
        **facts,
        sections=_SECTIONS,
        charts=charts(facts),
        quality=_quality(facts["models"]),
        text_rows=[_text_row(text) for text in facts["texts"]],
        massive_rows=[_massive(block, found) for block, found in facts["massive"].items()],
        engine_rows=[(e["format"], e["runs_in"], e["export"], e["run"]) for e in facts["engines"]],
        data_rows=[_data(source) for source in facts["data"]],
        environment_rows=[*rows, *((name, "–", value) for name, value in here)],
        digest_rows=list(facts["digests"].items()),
        load=_LOAD.format(path=facts["directory"]),
    )


def comparison(found: dict[str, Any]) -> str:
    """The page of a comparison."""
    named = [chart] if (chart := differences(found["pairs"])) else []
    return _page(
        "compare.html",
        **found,
        sections=(("scores", "Scores"), ("differences", "Differences"), ("answers", "Answers that changed")),
        charts={chart.id: chart for chart in named},
    )


def _page(template: str, **values: Any) -> str:
    check_packages()
    import jinja2
    import vl_convert
    from markupsafe import Markup

    folder = resources.files("upq.reports").joinpath("templates")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    filters: dict[str, Any] = {
        "size": size,
        "duration": duration,
        "rate": lambda rate: f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
        "strength": _strength,
        "kl": lambda kld: "–" if kld is None else f"{kld:.3f}",
        "mean": lambda klds: f"{sum(k or 0 for k in klds) / len(klds):.3f}" if klds else "–",
        "largest": _largest,
    }
    environment.filters |= filters
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_vega_lite())
    assert "</script" not in bundle
    page: str = environment.get_template(template).render(
        **values,
        version=upq.__version__,
        bundle=Markup(bundle),
        css=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        js=Markup(folder.joinpath("page.js").read_text(encoding="utf-8")),
    )
    if (length := len(page.encode())) > LIMIT:
        raise UPQError(f"the page would have {length:,} bytes, more than {LIMIT:,}; give fewer prompts or texts")
    return page


def _vega_lite() -> str:
    import vl_convert

    newest: str = vl_convert.get_vegalite_versions()[-1]
    return newest


def _strength(kld: float | None) -> str:
    """Per cent of colour: by the root, so that small distances show."""
    return f"{_STRONGEST * math.sqrt(min(max(kld or 0.0, 0.0), _DARKEST) / _DARKEST):.0f}"


def _largest(prompt: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    found = [
        (kld, token, _NAMES.get(name, name), i + 1)
        for name, answer in prompt["answers"].items()
        for i, (token, kld) in enumerate(zip(answer["tokens"], answer["kld"], strict=True))
        if kld is not None
    ]
    largest = sorted(found, key=lambda each: -each[0])[:8]
    return [(repr(token), name, str(position), f"{kld:.3f}") for kld, token, name, position in largest]


def with_interval(value: float | None, stderr: float | None, style: str) -> str:
    """A value and half of its 95 % interval."""
    if value is None:
        return "–"
    if stderr is None:
        return f"{value:{style}}"
    return f"{value:{style}} ± {Z95 * stderr:{style}}"


def _quality(models: dict[str, Any]) -> dict[str, Any]:
    measured = {name: figures for name, figures in models.items() if "ppl" in figures or "tasks" in figures}
    tasks = sorted(
        {
            (task, metric)
            for figures in measured.values()
            for task, metrics in (figures.get("tasks") or {}).items()
            for metric in metrics
            if metric != "samples" and "_stderr" not in metric
        }
    )
    rows = []
    for name, figures in measured.items():
        row = [_NAMES.get(name, f"after {name}")]
        row.append(size(figures["bytes"]) if "bytes" in figures else "–")
        row.append(f"{figures['bits_per_weight']:.3f}" if "bits_per_weight" in figures else "–")
        row += [with_interval(figures.get(key), figures.get(f"{key}_stderr"), style) for _, key, style in _MEASURES]
        for task, metric in tasks:
            metrics = (figures.get("tasks") or {}).get(task, {})
            stem, comma, filter_name = metric.partition(",")
            value = metrics.get(metric)
            style = ".1%" if value is not None and 0 <= value <= 1 else ".4g"
            row.append(with_interval(value, metrics.get(f"{stem}_stderr{comma}{filter_name}"), style))
        rows.append(row)
    columns = ["model", "size", "bits a weight", *(title for title, _, _ in _MEASURES)]
    return {"columns": [*columns, *(f"{task} {metric}" for task, metric in tasks)], "rows": rows, "tasks": bool(tasks)}


def _text_row(text: dict[str, Any]) -> Sequence[str]:
    return (
        text["name"],
        f"{text['tokens']:,}",
        with_interval(text["ppl"], text["ppl_stderr"], ".3f"),
        with_interval(text["teacher_ppl"], text["teacher_ppl_stderr"], ".3f"),
        with_interval(text["kld"], text["kld_stderr"], ".4f"),
        with_interval(text["top1"], text["top1_stderr"], ".1%"),
    )


def _massive(block: str, found: dict[str, Any]) -> Sequence[str]:
    norm = f"{found['norm'] / found['usual']:.0f}" if found.get("usual") else "–"
    return block, f"{found.get('tokens')} of {found.get('of')}", norm, f"{found.get('error') or 0:.3f}"


def _data(source: dict[str, Any]) -> tuple[str, str]:
    rest = ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
        for key, value in source.items()
        if key != "path"
    )
    return str(source.get("path", "training rows")), rest

"""The charts of a page: Vega-Lite specifications, each with the table that holds the same numbers.

Colours of text, axes and grid are the page's own (`currentColor`), so a chart follows light, dark and print. Those of
marks have a contrast of at least 3 to both backgrounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from upq.core.sizes import size
from upq.run.reporter import duration

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name; nothing is fetched
COLOURS = ("#2f7fc1", "#c4661f", "#1f8a70", "#a8559a", "#8a7a1f", "#c2485a", "#5f6fd0", "#6f7680")
POINTS = 400  # of a line; more steps are averaged
CELLS = 20_000  # of the picture of layers
Z95 = 1.959963984540054  # a standard error times this: half of a 95 % interval

Spec = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """`says` is read out in place of the picture."""

    id: str
    title: str
    says: str
    spec: Spec
    columns: Sequence[str]
    rows: Sequence[Sequence[str]] = field(repr=False)


def charts(facts: dict[str, Any]) -> dict[str, Chart]:
    """Those for which there are figures."""
    found: list[Chart | None] = [
        layers(facts["layers"]),
        blocks(facts["blocks"]),
        *(curve(facts["steps"], *each) for each in CURVES),
        positions({"the last check": facts["positions"], **{t["name"]: t["positions"] for t in facts["texts"]}}),
        kinds(facts["texts"], facts["prompts"]),
        clocks(facts["stages"]),
        memory(facts["stages"]),
    ]
    return {chart.id: chart for chart in found if chart is not None}


def layers(found: Sequence[dict[str, Any]]) -> Chart | None:
    """Block by linear: the error of each weight."""
    values = [each for each in found if each["error"] is not None and each["block"] is not None]
    if not values:
        return None
    worst = max(values, key=lambda each: each["error"])
    data = [{"block": v["block"], "linear": v["linear"], "error": round(v["error"], 5)} for v in values[:CELLS]]
    linears = list(dict.fromkeys(v["linear"] for v in values))
    spec = {
        "height": 22 * len(linears),
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {
            "x": {
                "field": "block",
                "type": "ordinal",
                "title": "block",
                "axis": {"labelOverlap": True, "labelAngle": 0},
            },
            "y": {"field": "linear", "type": "nominal", "title": None, "sort": linears},
            "color": {
                "field": "error",
                "type": "quantitative",
                "title": "error",
                "scale": {"scheme": "viridis", "zero": False},
                "legend": {"orient": "bottom", "gradientLength": 200},
            },
            "tooltip": _tooltip(("block", ""), ("linear", ""), ("error", ".4f")),
        },
    }
    return Chart(
        "layers",
        "Error of every weight matrix",
        f"Relative error ‖Ŵ − W‖ / ‖W‖ after the block-wise stage, before the training, of {len(values)} matrices: "
        f"{min(v['error'] for v in values):.3f} to {worst['error']:.3f}, the largest in {worst['name']}.",
        _spec(data, spec),
        ("matrix", "bits", "error"),
        [
            (v["name"], "" if v["bits_per_weight"] is None else f"{v['bits_per_weight']:.3f}", _n(v["error"]))
            for v in values
        ],
    )


def blocks(found: Sequence[dict[str, Any]]) -> Chart | None:
    """The error of each block's output, and what learning took off the stage's own objective."""
    values = [each for each in found if each.get("error") is not None]
    if not values:
        return None
    data = [{"stage": v["stage"], "block": v["block"], "error": v["error"], "before": _before(v)} for v in values]
    spec = {
        "height": 200,
        "mark": {"type": "line", "point": True, "tooltip": True},
        "encoding": {
            "x": {
                "field": "block",
                "type": "ordinal",
                "title": "block",
                "axis": {"labelOverlap": True, "labelAngle": 0},
            },
            "y": {"field": "error", "type": "quantitative", "title": "error of the output"},
            "color": _colour("stage"),
            "tooltip": _tooltip(("stage", ""), ("block", ""), ("error", ".4f"), ("before", "")),
        },
    }
    return Chart(
        "blocks",
        "Error of each block's output",
        "‖difference‖ / ‖target‖ behind the quantised blocks before it, so errors add up with depth. "
        f"Behind the last block: {values[-1]['error']:.3f}.",
        _spec(data, spec),
        ("stage", "block", "error", "objective after learning, of before", "seconds"),
        [(v["stage"], str(v["block"]), _n(v["error"]), _before(v), _n(v.get("seconds"))) for v in values],
    )


def _before(block: dict[str, Any]) -> str:
    before, after = block.get("objective_before"), block.get("objective_after")
    return f"{after / before:.0%}" if before and after is not None else "–"


# Key of a step's line, title, and what the axis says.
CURVES = (
    ("loss", "Loss", "nats a token"),
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("at_limit", "Share of answers cut at the limit", ""),
    ("loops", "Share of answers that loop", ""),
)


def curve(steps: Sequence[dict[str, Any]], key: str, title: str, unit: str) -> Chart | None:
    """A figure over the steps, a line a stage."""
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for step in steps:
        if step.get(key) is not None:
            by_stage.setdefault(step["stage"], []).append(step)
    if not by_stage:
        return None
    data = [{"stage": stage, **point} for stage, lines in by_stage.items() for point in _thinned(lines, key)]
    joined = max(-(-len(lines) // POINTS) for lines in by_stage.values())
    last = [lines[-1] for lines in by_stage.values()][-1]
    spec = {
        "height": 160,
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickMinStep": 1}},
            "y": {"field": key, "type": "quantitative", "title": unit or None, "scale": {"zero": key != "loss"}},
            "color": _colour("stage"),
        },
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 1.5}},
            {
                "mark": {"type": "point", "filled": True, "size": 60, "tooltip": True},
                "encoding": {
                    "opacity": {"condition": {"param": f"near_{key}", "value": 1, "empty": False}, "value": 0},
                    "tooltip": _tooltip(("stage", ""), ("step", ""), ("tokens", ","), (key, ".4~g")),
                },
                "params": [
                    {
                        "name": f"near_{key}",
                        "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"},
                    }
                ],
            },
        ],
    }
    said = f"{len(steps)} steps; the last one has {_n(last[key])}{f' {unit}' if unit else ''}."
    return Chart(
        f"steps-{key}",
        title,
        said + (f" A point is the mean of up to {joined} steps." if joined > 1 else ""),
        _spec(data, spec),
        ("stage", "step", "tokens", title.lower()),
        [(p["stage"], str(p["step"]), f"{p['tokens']:,}", _n(p[key])) for p in data],
    )


def _thinned(lines: Sequence[dict[str, Any]], key: str) -> Iterable[dict[str, Any]]:
    joined = -(-len(lines) // POINTS)
    for start in range(0, len(lines), joined):
        some = lines[start : start + joined]
        mean = sum(line[key] for line in some) / len(some)
        yield {"step": some[-1]["step"], "tokens": some[-1].get("tokens", 0), key: float(f"{mean:.5g}")}


def positions(by_kind: dict[str, Sequence[dict[str, Any]]]) -> Chart | None:
    data = [
        {
            "text": kind,
            "position": f"{p['start']}–{p['stop'] - 1}" if p["stop"] - p["start"] > 1 else str(p["start"]),
            "start": p["start"],
            "kld": p["kld"],
            "low": max(0.0, p["kld"] - Z95 * (p["kld_stderr"] or 0)),
            "high": p["kld"] + Z95 * (p["kld_stderr"] or 0),
            "tokens": p["tokens"],
        }
        for kind, found in by_kind.items()
        for p in found
    ]
    if not data:
        return None
    x = {
        "field": "position",
        "type": "ordinal",
        "title": "position in its row",
        "sort": {"field": "start"},
        "axis": {"labelOverlap": True, "labelAngle": 0},
    }
    spec = {
        "height": 200,
        "encoding": {"x": x, "color": _colour("text")},
        "layer": [
            {
                "mark": {"type": "errorbar", "ticks": True},
                "encoding": {
                    "y": {"field": "low", "type": "quantitative", "title": "KL, nats a token"},
                    "y2": {"field": "high"},
                },
            },
            {
                "mark": {"type": "line", "point": True, "tooltip": True},
                "encoding": {
                    "y": {"field": "kld", "type": "quantitative", "title": "KL, nats a token"},
                    "tooltip": _tooltip(("text", ""), ("position", ""), ("kld", ".4f"), ("tokens", ",")),
                },
            },
        ],
    }
    return Chart(
        "positions",
        "KL by position",
        "KL(original ‖ artefact) of tokens by how many stand before them, with 95 % intervals over rows.",
        _spec(data, spec),
        ("text", "position", "tokens", "KL", "95 % interval"),
        [
            (d["text"], d["position"], f"{d['tokens']:,}", _n(d["kld"]), f"{_n(d['low'])} – {_n(d['high'])}")
            for d in data
        ],
    )


def kinds(texts: Sequence[dict[str, Any]], prompts: Sequence[dict[str, Any]]) -> Chart | None:
    """KL by text, and that of the answers to the prompts."""
    data = [
        {"text": t["name"], "kld": t["kld"], "half": Z95 * (t["kld_stderr"] or 0), "tokens": t["tokens"]} for t in texts
    ]
    for name, title in (("original", "answers of the original"), ("artifact", "answers of the artefact")):
        found = [kld for prompt in prompts for kld in prompt["answers"][name]["kld"] if kld is not None]
        if found:
            data.append({"text": title, "kld": sum(found) / len(found), "half": 0.0, "tokens": len(found)})
    if not data:
        return None
    for each in data:
        each |= {"low": max(0.0, each["kld"] - each["half"]), "high": each["kld"] + each["half"]}
    y = {"field": "text", "type": "nominal", "title": None, "sort": None}
    spec = {
        "height": 34 * len(data),
        "encoding": {"y": y},
        "layer": [
            {
                "mark": {"type": "bar", "height": 16, "color": COLOURS[0], "tooltip": True},
                "encoding": {
                    "x": {"field": "kld", "type": "quantitative", "title": "KL, nats a token"},
                    "tooltip": _tooltip(("text", ""), ("kld", ".4f"), ("tokens", ",")),
                },
            },
            {
                "transform": [{"filter": "datum.half > 0"}],
                "mark": {"type": "errorbar", "ticks": True, "color": "currentColor"},
                "encoding": {
                    "x": {"field": "low", "type": "quantitative", "title": "KL, nats a token"},
                    "x2": {"field": "high"},
                },
            },
        ],
    }
    return Chart(
        "kinds",
        "KL by kind of text",
        "KL(original ‖ artefact), with 95 % intervals over rows; of answers without one.",
        _spec(data, spec),
        ("text", "tokens", "KL", "±"),
        [(d["text"], f"{d['tokens']:,}", _n(d["kld"]), _n(d["half"]) if d["half"] else "–") for d in data],
    )


def clocks(stages: Sequence[dict[str, Any]]) -> Chart | None:
    data = [{"stage": s["stage"], "minutes": s["seconds"] / 60, "time": duration(s["seconds"])} for s in stages]
    if not data:
        return None
    total = duration(sum(stage["seconds"] for stage in stages))
    return _bars(
        "clocks", "Time by stage", f"{total} in all, over all calls of the run.", data, "minutes", "time", "minutes"
    )


def memory(stages: Sequence[dict[str, Any]]) -> Chart | None:
    data = [
        {"stage": s["stage"], "GB": s["peak_memory_bytes"] / 1e9, "memory": size(s["peak_memory_bytes"])}
        for s in stages
        if s.get("peak_memory_bytes") is not None
    ]
    if not data:
        return None
    says = "The largest that the process has been up to the end of each stage: a stage that adds nothing fits in less."
    return _bars("memory", "Memory by stage", says, data, "GB", "memory", "GB, peak so far")


def _bars(id_: str, title: str, says: str, data: list[Any], key: str, shown: str, axis: str) -> Chart:
    spec = {
        "height": 28 * len(data),
        "mark": {"type": "bar", "height": 16, "color": COLOURS[0], "tooltip": True},
        "encoding": {
            "y": {"field": "stage", "type": "nominal", "title": None, "sort": None},
            "x": {"field": key, "type": "quantitative", "title": axis},
            "tooltip": _tooltip(("stage", ""), (shown, "")),
        },
    }
    return Chart(id_, title, says, _spec(data, spec), ("stage", shown), [(d["stage"], d[shown]) for d in data])


def differences(pairs: Sequence[dict[str, Any]]) -> Chart | None:
    """Of a comparison: each paired difference with its interval, and the zero line."""
    if not pairs:
        return None
    data = [
        {
            "what": f"{p['measure']}: {p['b']} − {p['a']}" if p["named"] else p["measure"],
            "difference": p["difference"],
            "low": p["low"],
            "high": p["high"],
            "verdict": p["verdict"],
        }
        for p in pairs
    ]
    spec = {
        "height": 34 * len(data),
        "encoding": {"y": {"field": "what", "type": "nominal", "title": None, "sort": None}},
        "layer": [
            {
                "mark": {"type": "rule", "strokeDash": [4, 3], "color": "currentColor"},
                "encoding": {"x": {"datum": 0}, "y": None},
            },
            {
                "mark": {"type": "errorbar", "ticks": True, "color": "currentColor"},
                "encoding": {
                    "x": {"field": "low", "type": "quantitative", "title": "difference, 95 % interval"},
                    "x2": {"field": "high"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70, "color": COLOURS[0], "tooltip": True},
                "encoding": {
                    "x": {"field": "difference", "type": "quantitative"},
                    "tooltip": _tooltip(("what", ""), ("difference", ".4f"), ("low", ".4f"), ("high", ".4f")),
                },
            },
        ],
    }
    return Chart(
        "differences",
        "Paired differences",
        "Each on the same items; an interval that holds 0 shows no difference.",
        _spec(data, spec),
        ("measure", "difference", "95 % interval", "verdict"),
        [(d["what"], _n(d["difference"]), f"{_n(d['low'])} – {_n(d['high'])}", d["verdict"]) for d in data],
    )


def _spec(data: Sequence[dict[str, Any]], spec: Spec) -> Spec:
    autosize = {"type": "fit-x", "contains": "padding"}
    return {"$schema": SCHEMA, "width": "container", "autosize": autosize, "data": {"values": list(data)}, **spec}


def _colour(name: str) -> Spec:
    return {
        "field": name,
        "type": "nominal",
        "title": None,
        "sort": None,
        "scale": {"range": list(COLOURS)},
        "legend": {"orient": "top"},
    }


def _tooltip(*fields: tuple[str, str]) -> list[Spec]:
    return [{"field": name, **({"format": form, "type": "quantitative"} if form else {})} for name, form in fields]


def _n(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"

"""The pictures of the docs: small, on no background, in tones that can be read on white and on black."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from _design import CURVES, GROUPS, ORIGINAL
from _findings import KL, SUITES, Results, curve
from upq.evals.speed import Speed

GREY = "#808890"
TONES = ("#d1495b", "#e08e45", "#2a9d8f", "#4f8fd0", "#a06cd5")
CHANCE = 0.25  # mini_mmlu has four options
BETAS = {0.0: "paper-fkl", 0.25: "paper-beta-25", 0.5: "paper", 0.75: "paper-beta-75", 1.0: "paper-rkl"}
_WIDTH, _HEIGHT, _DPI = 9.0, 3.2, 110


def suites(results: Results, path: Path) -> bool:
    """Scores of the main rows as bars, error bars over seeds; False where there is nothing to draw."""
    rows = {label: results.of(row) for label, row in GROUPS["main"].rows.items()}
    rows = {label: runs for label, runs in rows.items() if runs and SUITES[0] in runs[0].figures}
    if len(rows) < 2:
        return False
    with _figure(path, len(SUITES), height=0.9 + 0.3 * len(rows)) as axes:
        for axis, suite, tone in zip(axes, SUITES, (TONES[3], TONES[2]), strict=True):
            values = [[100 * run.figures[suite] for run in runs] for runs in rows.values()]
            means = [statistics.mean(each) for each in values]
            errors = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
            places = range(len(rows), 0, -1)
            axis.barh(places, means, xerr=errors, height=0.7, color=tone, error_kw={"ecolor": GREY, "capsize": 2})
            for place, mean, error in zip(places, means, errors, strict=True):
                axis.text(mean + error + 1.5, place, f"{mean:.0f}", va="center", color=GREY, fontsize=8)
            axis.set(title=f"{suite}, %", xlim=(0, 112), xticks=range(0, 101, 25), yticks=places)
            axis.set_yticklabels([label.replace("`", "") for label in rows] if axis is axes[0] else [])
        axes[0].axvline(100 * CHANCE, color=GREY, linewidth=0.8, linestyle=":")
    return True


def curves(results: Results, path: Path) -> bool:
    """Scores and KL against training tokens."""
    drawn = [key for key in (*SUITES, KL.key) if any(len(curve(results, row, key)) > 1 for row in CURVES.values())]
    if not drawn:
        return False
    with _figure(path, len(drawn)) as axes:
        for axis, key in zip(axes, drawn, strict=True):
            scale = 1 if key == KL.key else 100
            for tone, (label, row) in zip(TONES, CURVES.items(), strict=True):
                points = curve(results, row, key)
                axis.plot(
                    [tokens / 1e3 for tokens, _ in points],
                    [scale * value for _, value in points],
                    marker="o",
                    markersize=3.5,
                    color=tone,
                    label=label,
                )
            full = results.mean(ORIGINAL, key)
            if full is not None and key != KL.key:
                axis.axhline(100 * full, color=GREY, linewidth=0.8, linestyle="--", label="original")
            axis.set(title="KL to the original" if key == KL.key else f"{key}, %", xlabel="thousand tokens")
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        lines, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(
            lines, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8, labelcolor=GREY
        )
    return True


def betas(results: Results, path: Path) -> bool:
    """Scores and KL against β on seed 0, with standard errors."""
    runs = {beta: results.of(row)[0].figures for beta, row in BETAS.items() if results.of(row)}
    if len(runs) < len(BETAS):
        return False
    scored = [suite for suite in SUITES if all(suite in figures for figures in runs.values())]

    def draw(axis: Axes, key: str, scale: float, tone: str) -> None:
        values = [scale * figures[key] for figures in runs.values()]
        errors = [scale * figures.get(f"{key}_stderr", 0.0) for figures in runs.values()]
        axis.errorbar([*runs], values, yerr=errors, marker="o", markersize=4, capsize=2, color=tone, label=key)
        axis.set(xlabel="β", xticks=[*runs])
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])

    with _figure(path, 2 if scored else 1) as axes:
        for tone, suite in zip((TONES[3], TONES[2]), scored, strict=False):
            draw(axes[0], suite, 100, tone)
            axes[0].set_title("scores, %")
            axes[0].legend(frameon=False, fontsize=8, labelcolor=GREY, loc="lower center")
        draw(axes[-1], KL.key, 1, TONES[0])
        axes[-1].set_title("KL to the original")
    return True


def decoding(speeds: Sequence[Speed], read: float, path: Path) -> None:
    """Tokens a second against the bytes that a token reads; the line is what memory delivers, `read` bytes a second."""
    known = [(speed.name, speed.bytes_per_token / 1e6, speed.decode) for speed in speeds if speed.bytes_per_token]
    with _figure(path, 1) as (axis,):
        sizes = [size for _, size, _ in known]
        ends = (min(sizes) / 1.4, max(sizes) * 2.5)
        line = [read / 1e6 / size for size in ends]
        axis.plot(ends, line, color=GREY, linewidth=0.8, linestyle="--")
        axis.text(
            2.2 * min(sizes),
            read / 1e6 / min(sizes) / 1.7,
            f"a plain read, {read / 1e9:.1f} GB/s",
            color=GREY,
            fontsize=8,
        )
        for tone, (name, size, rate) in zip(TONES[::-1], known, strict=False):
            axis.plot(size, rate, "o", color=tone, markersize=6)
            axis.annotate(name, (size, rate), (0, -13), textcoords="offset points", ha="center", color=tone, fontsize=8)
        axis.set(xscale="log", yscale="log", xlim=ends, xlabel="MB read a token", title="decoding, tokens a second")
        axis.set_ylim(min(line[1], *(rate for *_, rate in known)) / 1.8, line[0] * 1.2)
        for ticks, values in ((axis.set_xticks, (200, 500, 1000, 2000)), (axis.set_yticks, (5, 10, 20, 50, 100))):
            ticks(values, [f"{value}" for value in values])
        axis.minorticks_off()


@contextmanager
def _figure(path: Path, panels: int, *, height: float = _HEIGHT) -> Iterator[Sequence[Axes]]:
    colours = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False} | dict.fromkeys(colours, GREY)
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1, panels, figsize=(_WIDTH * panels / 3 + 2, height), squeeze=False, layout="constrained"
        )
        yield axes[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        # without the library's version in it, the same numbers make the same file
        figure.savefig(path, dpi=_DPI, transparent=True, metadata={"Software": None})
        plt.close(figure)

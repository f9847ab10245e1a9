"""What the finished runs of the ablation say: differences with their errors, the paper's claims, the targets, tables.

Errors of a difference between two rows. The runs of both rows have the same seeds and the same items, so everything is
paired: the variance over items (of each item's difference, averaged over seeds) divided by their number, plus the
variance over seeds (of each seed's difference, averaged over items) divided by theirs. What depends on item and seed
together is in both terms, so the error is on the safe side. With one seed the second term is missing. Figures on text
have no items here; for them the standard errors of both rows over the rows of text take the place of the first term.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _design import CURVES, GROUPS, ORIGINAL, UNSEEDED, Group, Task, budget, budgets
from _table import Figure, Table, read_csv, spread, write_csv

SUITES = ("mini_mmlu", "mini_ifeval")
AREA = "mini_mmlu_"
SURE = 2.0  # standard errors that a difference must exceed
KNOWS, OBEYS, LOST, KEPT = 0.90, 0.85, 0.40, 0.97  # the targets
BITS = (2.0, 2.1)
RIVALS = ("paper", "default")


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run: figures by name (absent where they do not apply), and its answers."""

    task: Task
    figures: dict[str, float]
    items: dict[str, str] = field(default_factory=dict)  # by suite: 1 where the answer was right, else 0


@dataclass(frozen=True, slots=True)
class Results:
    runs: tuple[Run, ...]
    tokens: int  # the budget of all tables but the curves

    def of(self, row: str) -> list[Run]:
        """Runs of a row at the tables' budget, by seed."""
        tokens = budget(row, self.tokens)
        found = [run for run in self.runs if (run.task.row, run.task.tokens) == (row, tokens)]
        return sorted(found, key=lambda run: run.task)

    def mean(self, row: str, name: str) -> float | None:
        values = [run.figures[name] for run in self.of(row) if name in run.figures]
        return statistics.mean(values) if values else None


# ---- files


def save(runs: Iterable[Run], path: Path) -> None:
    """Figures to `path`, a line a run; answers beside it, a line a run and suite."""
    named = [({"row": t.row, "seed": t.seed, "tokens": t.tokens}, r) for r in runs for t in [r.task]]
    write_csv(path, [name | run.figures for name, run in named])
    items = [name | {"suite": suite, "right": right} for name, run in named for suite, right in run.items.items()]
    if items:
        write_csv(items_of(path), items)


def load(path: Path, tokens: int) -> Results:
    items: dict[Task, dict[str, str]] = {}
    for line in read_csv(items_of(path)) if items_of(path).is_file() else ():
        items.setdefault(_task(line), {})[line["suite"]] = line["right"]
    runs = [Run(_task(line), _figures(line), items.get(_task(line), {})) for line in read_csv(path)]
    return Results(tuple(sorted(runs, key=lambda run: run.task)), tokens)


def items_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_items.csv")


def _task(line: dict[str, str]) -> Task:
    return Task(line["row"], int(line["seed"]), int(line["tokens"]))


def _figures(line: dict[str, str]) -> dict[str, float]:
    return {key: float(value) for key, value in line.items() if value and key not in ("row", "seed", "tokens")}


# ---- differences


@dataclass(frozen=True, slots=True)
class Measure:
    title: str
    key: str
    sign: int  # 1 where more is better
    style: str

    def show(self, value: float) -> str:
        return f"{value:{self.style}}"


KNOWLEDGE = Measure("mini_mmlu", "mini_mmlu", 1, ".1%")
OBEDIENCE = Measure("mini_ifeval", "mini_ifeval", 1, ".1%")
KL = Measure("KL", "kld", -1, ".4f")
TOP1 = Measure("top-1", "top1", 1, ".1%")
WEIGHTS = Measure("weight error", "weight_error", -1, ".3f")


@dataclass(frozen=True, slots=True)
class Difference:
    """By how much the first row is better than the second; `stderr` is None where no error can be given."""

    better: float
    stderr: float | None
    seeds: int

    @property
    def errors(self) -> float:
        """In standard errors; without one, infinite."""
        if self.stderr:
            return self.better / self.stderr
        return 0.0 if self.better == 0 else math.copysign(math.inf, self.better)


def difference(results: Results, first: str, second: str, measure: Measure) -> Difference | None:
    """Over the seeds that both have; a row that has seed 0 only because no seed can change it stands for every seed."""
    pairs = _pairs(results.of(first), results.of(second))
    pairs = [(a, b) for a, b in pairs if measure.key in a.figures and measure.key in b.figures]
    if not pairs:
        return None
    by_seed = [measure.sign * (a.figures[measure.key] - b.figures[measure.key]) for a, b in pairs]
    variance = _variance_of_mean(by_seed)
    if measure.key in SUITES:
        variance += _variance_of_mean(_item_differences(pairs, measure.key))
    elif f"{measure.key}_stderr" in pairs[0][0].figures:
        variance += sum(_mean_square([p[side].figures[f"{measure.key}_stderr"] for p in pairs]) for side in (0, 1))
    return Difference(statistics.mean(by_seed), math.sqrt(variance) or None, len(pairs))


def _pairs(first: list[Run], second: list[Run]) -> list[tuple[Run, Run]]:
    by_seed = [_by_seed(first, second), _by_seed(second, first)]
    return [(by_seed[0][seed], by_seed[1][seed]) for seed in sorted(by_seed[0].keys() & by_seed[1].keys())]


def _by_seed(runs: list[Run], others: list[Run]) -> dict[int, Run]:
    if runs and runs[0].task.row in UNSEEDED:
        return dict.fromkeys((run.task.seed for run in (*runs, *others)), runs[0])
    return {run.task.seed: run for run in runs}


def _item_differences(pairs: Sequence[tuple[Run, Run]], suite: str) -> list[float]:
    """Of each item, averaged over seeds."""
    each = [
        [int(x) - int(y) for x, y in zip(a.items[suite], b.items[suite], strict=True)]
        for a, b in pairs
        if suite in a.items and suite in b.items
    ]
    return [statistics.mean(values) for values in zip(*each, strict=True)]


def _variance_of_mean(values: Sequence[float]) -> float:
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.0


def _mean_square(values: Sequence[float]) -> float:
    return statistics.mean(value * value for value in values)


# ---- the paper's claims


@dataclass(frozen=True, slots=True)
class Comparison:
    first: str
    second: str
    measure: Measure


@dataclass(frozen=True, slots=True)
class Claim:
    """Holds if in every comparison the first row is better by more than `SURE` standard errors."""

    text: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    claim: Claim
    verdict: str
    evidence: tuple[str, ...]


def _each(first: str, second: str, *measures: Measure) -> tuple[Comparison, ...]:
    return tuple(Comparison(first, second, measure) for measure in measures)


CLAIMS = (
    Claim(
        "Next-token training on documents loses obedience",
        (*_each(ORIGINAL, "ce-from-fp", OBEDIENCE), *_each(ORIGINAL, "ce-from-int4", OBEDIENCE)),
    ),
    Claim(
        "JSD keeps obedience that next-token training loses, from FP and from INT4",
        (*_each("jsd-from-fp", "ce-from-fp", OBEDIENCE), *_each("paper", "ce-from-int4", OBEDIENCE)),
    ),
    Claim(
        "The INT4 step lowers the error before training",
        _each("int4-int2-nearest", "int2-nearest-seq", WEIGHTS, KL, TOP1),
    ),
    Claim(
        "The INT4 step lowers the error after training (Δ = max)",
        _each("paper", "jsd-from-fp", KL, TOP1, KNOWLEDGE, OBEDIENCE),
    ),
    Claim("The INT4 step still adds something where Δ is searched", _each("paper-mse", "jsd-from-fp-mse", KL, TOP1)),
    Claim(
        "The INT4 step still adds something where the 2-bit start is fitted block by block",
        (*_each("paper-block", "jsd-from-fp-block", KL, TOP1), *_each("default-through-int4", "default", KL, TOP1)),
    ),
    Claim(
        "JSD with INT4 wins both suites",
        tuple(
            comparison
            for other in ("ce-from-fp", "ce-from-int4", "jsd-from-fp")
            for comparison in _each("paper", other, KNOWLEDGE, OBEDIENCE)
        ),
    ),
)


def verdicts(results: Results) -> list[Verdict]:
    """Claims whose rows are all there."""
    found = []
    for claim in CLAIMS:
        differences = [difference(results, c.first, c.second, c.measure) for c in claim.comparisons]
        if any(d is None for d in differences):
            continue
        known = [d for d in differences if d is not None]
        if all(d.errors > SURE for d in known):
            verdict = "holds"
        elif any(d.errors < -SURE for d in known):
            verdict = "does not hold"
        else:
            verdict = "not shown"
        evidence = tuple(_told(results, c, d) for c, d in zip(claim.comparisons, known, strict=True))
        found.append(Verdict(claim, verdict, evidence))
    return found


def _told(results: Results, comparison: Comparison, found: Difference) -> str:
    measure = comparison.measure
    values = [results.mean(row, measure.key) for row in (comparison.first, comparison.second)]
    a, b = (measure.show(value) for value in values if value is not None)
    line = f"{measure.title}: {name_of(comparison.first)} {a}, {name_of(comparison.second)} {b}"
    seeds = f"{found.seeds} seed{'s' if found.seeds > 1 else ''}"
    if not found.stderr:
        return f"{line} ({seeds})"
    # Weights come out nearly equal on every seed, and thousands of standard errors say no more than a hundred.
    errors = f"{found.errors:+.1f}" if abs(found.errors) < 100 else f"more than {math.copysign(100, found.errors):+.0f}"
    return f"{line} ({errors} standard errors, {seeds})"


def name_of(row: str) -> str:
    """A row's label in the main table, or else its own name."""
    labels = {name: label for label, name in GROUPS["main"].rows.items()}
    return labels.get(row, f"`{row}`")


# ---- the targets


def targets(results: Results) -> list[Figure]:
    """Those whose rows are there."""
    figures = []
    for suite, least in zip(SUITES, (KNOWS, OBEYS), strict=True):
        full, nearest = results.mean(ORIGINAL, suite), results.mean("int2-nearest", suite)
        if full is None:
            continue
        figures.append(Figure(f"original, {suite}", 100 * full, "%", f">= {100 * least:.0f}", full >= least))
        if nearest is not None:
            lost = full - nearest
            figures.append(
                Figure(f"lost by 2-bit nearest, {suite}", 100 * lost, "points", f">= {100 * LOST:.0f}", lost >= LOST)
            )
    for suite in SUITES:
        full, best = results.mean(ORIGINAL, suite), results.mean("default", suite)
        if full and best is not None:
            kept = best / full
            name = f"default's share of the original's {suite}"
            figures.append(Figure(name, 100 * kept, "%", f">= {100 * KEPT:.0f}", kept >= KEPT))
    for measure in (KNOWLEDGE, OBEDIENCE):
        found = difference(results, "default", "paper", measure)
        if found is not None:
            name = f"default over paper, {measure.title} ({100 * found.better:+.1f} points)"
            figures.append(Figure(name, found.errors, "standard errors", f"> {SURE:.0f}", found.errors > SURE))
    bits = results.mean("default", "bits")
    if bits is not None and results.mean("default", "mini_mmlu") is not None:
        low, high = BITS
        figures.append(Figure("default, size", bits, "bits a weight", f"{low} to {high}", low <= bits <= high))
    return figures


# ---- tables

_COLUMNS = (
    ("bits", "bits", ".2f"),
    ("weight error", "weight_error", ".3f"),
    ("perplexity", "ppl", ".2f"),
    ("KL", "kld", ".4f"),
    ("top-1", "top1", ".1%"),
    ("perplexity, WikiText-2", "ppl_wikitext2", ".2f"),
    ("KL, WikiText-2", "kld_wikitext2", ".4f"),
    ("mini_mmlu", "mini_mmlu", ".1%"),
    ("mini_ifeval", "mini_ifeval", ".1%"),
    ("instructions", "mini_ifeval_instructions", ".1%"),
    ("loops", "loops", ".1%"),
    ("at limit", "at_length_limit", ".1%"),
)
_STAGES = ("generate", "int4", "int2", "distill")


def table_of(results: Results, group: Group) -> Table | None:
    """The figures of a group: over seeds where it has several, else with standard errors over items."""
    found = {label: runs for label, row in group.rows.items() if (runs := _seeds_of(results, row, group))}
    columns = [column for column in _COLUMNS if any(column[1] in r.figures for runs in found.values() for r in runs)]
    rows = [(label, *(_cell(runs, key, style) for _, key, style in columns)) for label, runs in found.items()]
    return Table(group.title, ("row", *(title for title, _, _ in columns)), tuple(rows)) if rows else None


def costs(results: Results, group: Group) -> Table | None:
    """Size, minutes of each stage and memory."""
    rows = []
    for label, row in group.rows.items():
        runs = [run for run in _seeds_of(results, row, group) if "peak" in run.figures]
        if not runs:
            continue
        minutes = [statistics.mean(r.figures.get(f"seconds_{stage}", 0.0) for r in runs) / 60 for stage in _STAGES]
        size, peak = runs[0].figures["bytes"], max(r.figures["peak"] for r in runs)
        cells = [f"{m:.1f}" if m >= 0.05 else "" for m in (*minutes, sum(minutes))]
        rows.append((label, f"{size / 1e6:.2f} MB", *cells, f"{peak / 1e6:.0f} MB"))
    head = ("row", "file", "own text, min", "INT4, min", "INT2, min", "training, min", "all, min", "peak memory")
    return Table(f"{group.title}: what they cost", head, tuple(rows)) if rows else None


def subjects(results: Results, group: Group) -> Table | None:
    """mini_mmlu by subject."""
    found = {label: runs for label, row in group.rows.items() if (runs := _seeds_of(results, row, group))}
    areas = [key for runs in found.values() for key in runs[0].figures if _is_area(key)]
    areas = list(dict.fromkeys(areas))
    rows = [(label, *(_cell(runs, area, ".0%") for area in areas)) for label, runs in found.items()]
    return (
        Table("mini_mmlu by subject", ("row", *(a.removeprefix(AREA) for a in areas)), tuple(rows)) if areas else None
    )


def curve(results: Results, row: str, key: str) -> list[tuple[int, float]]:
    """A figure against the training tokens, on seed 0."""
    spent = budgets(results.tokens)
    runs = [run for run in results.runs if run.task.row == row and run.task.seed == 0 and key in run.figures]
    return sorted((run.task.tokens, run.figures[key]) for run in runs if run.task.tokens in spent)


def curves(results: Results) -> Table | None:
    """The curves as a table: mini_mmlu and mini_ifeval at each budget."""
    keys = [key for key in (*SUITES, "kld") if any(len(curve(results, row, key)) > 1 for row in CURVES.values())]
    spent = sorted({tokens for row in CURVES.values() for key in keys for tokens, _ in curve(results, row, key)})
    rows = []
    for label, row in CURVES.items():
        for key in keys:
            values = dict(curve(results, row, key))
            style = ".4f" if key == "kld" else ".1%"
            if len(values) > 1:
                cells = [f"{values[b]:{style}}" if b in values else "" for b in spent]
                rows.append((f"{label}, {'KL' if key == 'kld' else key}", *cells))
    head = ("training tokens", *(f"{tokens:,}" for tokens in spent))
    return Table("Scores against training tokens", head, tuple(rows)) if rows else None


def larger_budgets(results: Results) -> Table | None:
    """`paper` and `default` where several seeds had more tokens than the tables give."""
    runs: dict[tuple[int, str], list[Run]] = {}
    for run in results.runs:
        if run.task.row in RIVALS and run.task.tokens > results.tokens:
            runs.setdefault((run.task.tokens, run.task.row), []).append(run)
    rows = []
    for (tokens, row), found in sorted(runs.items()):
        if len(found) > 1:
            scores = [f"{_cell(found, suite, '.1%')}{_share(results, found, suite)}" for suite in SUITES]
            rows.append((f"`{row}`, {tokens:,}", str(len(found)), _cell(found, "kld", ".4f"), *scores))
    head = ("row, training tokens", "seeds", "KL", *SUITES)
    return Table("With more tokens", head, tuple(rows)) if rows else None


def _share(results: Results, runs: Sequence[Run], suite: str) -> str:
    full = results.mean(ORIGINAL, suite)
    return f" ({statistics.mean(run.figures[suite] for run in runs) / full:.1%})" if full else ""


def _seeds_of(results: Results, row: str, group: Group) -> list[Run]:
    """One-seed tables compare seed 0 with seed 0, also where a row has more."""
    runs = results.of(row)
    return runs if group.every_seed else [run for run in runs if run.task.seed == 0]


def _cell(runs: Sequence[Run], key: str, style: str) -> str:
    values = [run.figures[key] for run in runs if key in run.figures]
    if not values:
        return ""
    if len(set(values)) == 1 and len(values) > 1:
        return f"{values[0]:{style}}"  # a size, which no seed changes
    error = runs[0].figures.get(f"{key}_stderr")
    if len(values) == 1 and error:
        return f"{values[0]:{style}} ± {error:{style}}"
    return spread(values, style)


def _is_area(key: str) -> bool:
    return key.startswith(AREA) and not key.endswith("_stderr")


def as_run(raw: dict[str, Any]) -> Run:
    """From the file that a finished run leaves."""
    figures = {key: value for key, value in raw["figures"].items() if value is not None}
    return Run(Task(raw["row"], raw["seed"], raw["tokens"]), figures, raw.get("items", {}))

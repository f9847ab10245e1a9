"""Progress of a run: bars with one ETA on a terminal and in notebooks, plain lines in a pipe."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from upq.core.progress import Progress, Silent
from upq.run.console import console, styled


@dataclass
class Estimate:
    """Remaining time of a run of several stages, from their costs and the time taken so far.

    A stage that has begun is judged by its own pace, one still to come by the pace of the run; work that an earlier
    run had done counts for nothing.
    """

    costs: dict[str, tuple[int, float]] = field(default_factory=dict)  # stage: (units, cost of the whole stage)
    finished: dict[str, int] = field(default_factory=dict)  # units, including those of an earlier run
    measured: dict[str, tuple[int, float]] = field(default_factory=dict)  # units timed in this run, and their seconds

    def remaining(self) -> float | None:
        """Seconds, or None before anything was measured."""
        spent = sum(seconds for _, seconds in self.measured.values())
        cost = sum(units * self._unit_cost(stage) for stage, (units, _) in self.measured.items())
        if cost == 0:
            return None
        total = 0.0
        for stage, (units, _) in self.costs.items():
            left = units - self.finished.get(stage, 0)
            timed, seconds = self.measured.get(stage, (0, 0.0))
            total += left * (seconds / timed if timed else self._unit_cost(stage) * spent / cost)
        return total

    def _unit_cost(self, stage: str) -> float:
        units, cost = self.costs[stage]
        return cost / max(units, 1)


class _Reporter:
    """Bookkeeping that bars and lines share."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.estimate = Estimate()
        self.stage = ""
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def plan(self, stages: dict[str, tuple[int, float]]) -> None:
        self.estimate = Estimate(costs=stages)

    def start(self, stage: str, *, done: int = 0) -> None:
        self.stage, self._since = stage, time.monotonic()
        self.estimate.finished[stage] = done

    def advance(self, units: int = 1, **figures: float) -> None:
        now = time.monotonic()
        timed, seconds = self.estimate.measured.get(self.stage, (0, 0.0))
        self.estimate.measured[self.stage] = (timed + units, seconds + now - self._since)
        self.estimate.finished[self.stage] = self.estimate.finished.get(self.stage, 0) + units
        self._since = now

    def note(self, text: str) -> None:
        self.console.print(styled((text, "dim")))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class LiveBars(_Reporter):
    """One bar a stage and one for the run; the run's bar fills with time, not with stages."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bars = Bars(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TextColumn("{task.fields[eta]}", style="dim", markup=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._begin = time.monotonic()

    def plan(self, stages: dict[str, tuple[int, float]]) -> None:
        super().plan(stages)
        for stage, (units, _) in stages.items():
            self._tasks[stage] = self._bars.add_task(stage, total=units, figures="", eta="")

    def start(self, stage: str, *, done: int = 0) -> None:
        super().start(stage, done=done)
        self._bars.update(self._tasks[stage], completed=done)

    def advance(self, units: int = 1, **figures: float) -> None:
        super().advance(units, **figures)
        shown = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        left = self.estimate.remaining()
        eta = f"run: {duration(time.monotonic() - self._begin)}"
        eta += f", {duration(left)} to go" if left is not None else ""
        for stage, task in self._tasks.items():
            if stage == self.stage:
                self._bars.update(task, advance=units, figures=shown, eta=eta)
            elif self.estimate.finished.get(stage):
                self._bars.update(task, figures="", eta="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks.values():
            self._bars.update(task, figures="", eta="")
        self._bars.stop()


class PlainLines(_Reporter):
    """A line at the start of a stage, then at most one each `every` seconds, and one at its end."""

    def __init__(self, console: Console, *, every: float) -> None:
        super().__init__(console)
        self._every = every
        self._last = 0.0

    def start(self, stage: str, *, done: int = 0) -> None:
        super().start(stage, done=done)
        units = self.estimate.costs.get(stage, (0, 0.0))[0]
        self._line(f"{stage}: {done}/{units}")

    def advance(self, units: int = 1, **figures: float) -> None:
        super().advance(units, **figures)
        total, done = self.estimate.costs[self.stage][0], self.estimate.finished[self.stage]
        if time.monotonic() - self._last < self._every and done < total:
            return
        left = self.estimate.remaining()
        shown = "".join(f"  {name} {value:.4g}" for name, value in figures.items())
        self._line(f"{self.stage}: {done}/{total}{shown}  {duration(left or 0)} to go")

    def note(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        self._last = time.monotonic()
        self.console.print(styled(text), soft_wrap=True)


def reporter(console: Console, *, every: float = 10.0) -> LiveBars | PlainLines:
    """Bars on a terminal, lines in a pipe or a log file. A notebook has bars where ipywidgets is installed.

    `every`: seconds that pass between two lines.
    """
    if console.is_jupyter:
        return LiveBars(console) if find_spec("ipywidgets") else PlainLines(console, every=every)
    return LiveBars(console) if console.is_terminal else PlainLines(console, every=every)


@contextmanager
def reporting(progress: Progress | Literal["auto"] | None, *, stderr: bool = False) -> Iterator[Progress]:
    """`progress` itself; for "auto" a reporter for this terminal, pipe or notebook; for None a silent one."""
    if progress == "auto":
        with reporter(console(stderr=stderr)) as made:
            yield made
    else:
        yield progress or Silent()


@contextmanager
def loading(progress: object = "auto", what: str = "torch and transformers") -> Iterator[None]:
    """A line on a terminal's stderr while something is loaded: imports alone take 3 to 10 s. Only where it is "auto".

    A pipe gets nothing: its stderr holds errors, one line each. Under torchrun the first process alone shows it.
    """
    shown = console(stderr=True)
    if progress == "auto" and shown.is_terminal and os.environ.get("RANK", "0") == "0":
        with shown.status(styled(f"loading {what} …")):
            yield
    else:
        yield


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

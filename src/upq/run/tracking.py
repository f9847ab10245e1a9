"""A run's figures for the trackers that its recipe names, through accelerate's classes. Else none of them is imported.

A tracker gets the lines of metrics.jsonl, numbered in one row over all stages. A run that goes on is a new run of the
tracker, which begins with the lines that are there already. So it has every line once, as metrics.jsonl has.

Law (tests/test_tracking.py): of a run that was killed and goes on a tracker has what it has of one that was not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from upq.core.errors import UPQError
from upq.files.atomic import write_errors
from upq.files.metrics import Line

TRACKING = "tracking"  # the folder in a run's directory, for trackers that write files
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


def check_trackers(names: Sequence[Tracker]) -> None:
    """Before work begins. Raises UPQError where a package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise UPQError(f"track: {name} is not installed; pip install {name}, or leave it out of the recipe")


class Tracking:
    """Trackers of one run, open. In all processes but the first without any."""

    def __init__(
        self,
        names: Sequence[Tracker],
        run: str,
        out: Path,
        settings: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self._note, self._lines, self._open = note, 0, dict[str, Any]()
        folder = out / TRACKING
        if names:
            with write_errors(folder):
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: its lines come again
        for name in names:
            try:
                self._open[name] = _opened(name, run, folder, settings)
            except Exception as error:
                self.finish()
                raise UPQError(f"track: {name} does not start: {_one_line(error)}") from error

    def line(self, line: Line) -> None:
        """One line of metrics.jsonl, as it is written or read again."""
        figures = {key: value for key, value in line.items() if key not in ("kind", "stage", line["kind"])}
        self.figures(line["stage"], figures)
        self._lines += 1

    def figures(self, group: str, figures: Mapping[str, Any]) -> None:
        """Numbers under `group/name`, at the line that comes next. What is no number stays out."""
        numbers = {f"{group}/{k}": v for k, v in figures.items() if isinstance(v, int | float)}
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(numbers, step=self._lines)
            except Exception as error:  # a server that has gone away takes no hours of work with it
                self._note(f"track: {name} failed ({_one_line(error)}); the run goes on without it")
                del self._open[name]

    def finish(self) -> None:
        """Writes what is still in memory."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                tracker.finish()
            except Exception as error:
                self._note(f"track: {name} failed at its end ({_one_line(error)})")


def _opened(name: Tracker, run: str, folder: Path, settings: Mapping[str, Any]) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    cls = LOGGER_TYPE_TO_CLASS[name]
    if name == "mlflow":
        tracker = cls(experiment_name=run)
    elif cls.requires_logging_directory:
        tracker = cls(run, logging_dir=str(folder))
    else:
        tracker = cls(run)
    tracker.start()
    plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in settings.items()}
    tracker.store_init_configuration(plain)
    return tracker


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

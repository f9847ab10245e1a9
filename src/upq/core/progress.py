"""Progress of a long run: stages, units of work within them, and figures such as the loss."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a run. Costs are proportional to the work of a stage, so one ETA spans all stages."""

    def plan(self, stages: dict[str, tuple[int, float]]) -> None:
        """Announce every stage in order: name to (units, cost of the whole stage in any common measure)."""
        ...

    def start(self, stage: str, *, done: int = 0) -> None:
        """Enter `stage`, with `done` of its units taken from an earlier run."""
        ...

    def advance(self, units: int = 1, **figures: float) -> None:
        """`units` more of the current stage are finished; `figures` describe the last one."""
        ...

    def note(self, text: str) -> None:
        """A line worth keeping: what was decided, resumed or skipped."""
        ...


class Silent:
    """No output: for library use and tests."""

    def plan(self, stages: dict[str, tuple[int, float]]) -> None: ...
    def start(self, stage: str, *, done: int = 0) -> None: ...
    def advance(self, units: int = 1, **figures: float) -> None: ...
    def note(self, text: str) -> None: ...

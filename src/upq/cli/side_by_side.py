"""Two models' answers to one message in two columns, as they come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from upq.run.console import styled


@dataclass
class Side:
    """A model with its own history: each goes on from its own answers."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    history: list[dict[str, str]]
    said: str = ""
    speed: str = ""


class Columns(TextStreamer):
    """Puts one side's text into its column; times its tokens from the first one on."""

    def __init__(self, side: Side, shown: Live, sides: list[Side]) -> None:
        super().__init__(side.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._side, self._shown, self._sides = side, shown, sides
        self._times: list[float] = []
        side.said = side.speed = ""

    def put(self, value: Any) -> None:
        prompt = self.next_tokens_are_prompt
        super().put(value)  # type: ignore[no-untyped-call]
        if not prompt:
            self._times.append(time.perf_counter())

    def end(self) -> None:
        super().end()  # type: ignore[no-untyped-call]
        tokens, times = len(self._times), self._times
        rate = f", {(tokens - 1) / (times[-1] - times[0]):,.3g} tokens/s" if tokens > 1 else ""
        self._side.speed = f"{tokens} tokens{rate}"
        self._shown.update(columns(self._sides))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._side.said += text
        self._shown.update(columns(self._sides))


def columns(sides: list[Side]) -> Table:
    """Of equal width, whatever stands in them."""
    made = Table(expand=True, show_lines=False)
    for side in sides:
        made.add_column(styled(side.name), ratio=1, overflow="fold", header_style="bold green")
    made.add_row(*(styled(side.said.strip()) for side in sides))
    if any(side.speed for side in sides):
        made.add_section()
        made.add_row(*(Text(side.speed, style="dim") for side in sides))
    return made


@contextmanager
def live(console: Console, sides: list[Side]) -> Iterator[Live]:
    """On a terminal the columns grow; elsewhere they are printed once."""
    with Live(columns(sides), console=console, auto_refresh=console.is_terminal, refresh_per_second=8) as shown:
        yield shown

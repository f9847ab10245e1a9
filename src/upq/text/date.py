"""The date that a chat template reads: the same in all runs.

Templates put the day into their system prompt (`strftime_now`). With the clock's own, the same command would train on
other text tomorrow, and a run that goes on after midnight on two kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from transformers.utils import chat_template_utils

TODAY = datetime(2024, 7, 26)  # what Llama 3's own template falls back on without a clock


class _Fixed(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return TODAY


@contextmanager
def fixed_date() -> Iterator[None]:
    """Templates that are rendered within read `TODAY`. transformers hands no function to a template, so its clock is
    exchanged."""
    module: Any = chat_template_utils
    clock = module.datetime
    module.datetime = _Fixed
    try:
        yield
    finally:
        module.datetime = clock

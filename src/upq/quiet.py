"""Libraries speak only when something is wrong: their bars and hints would break up our own."""

from __future__ import annotations

import datasets
import transformers


def quiet_libraries() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()

"""Libraries speak only when something is wrong: their bars and hints would break up our own."""

from __future__ import annotations

import datasets
import huggingface_hub.utils.logging
import transformers


def quiet_libraries() -> None:
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()

"""Libraries write only when something is wrong: their bars and hints would break up our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """For the rest of the process."""
    import datasets
    import huggingface_hub.utils.logging
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@contextmanager
def quietly() -> Iterator[None]:
    """Quiet libraries within; afterwards they are as loud as before."""
    import datasets
    import huggingface_hub.utils.logging
    import transformers

    loggers = (transformers.utils.logging, huggingface_hub.utils.logging, datasets.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    bars = (transformers.utils.logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled())
    quiet_libraries()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        if bars[0]:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if bars[1]:
            datasets.enable_progress_bars()

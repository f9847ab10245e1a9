"""Errors of libraries on files that strangers wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from upq.core.errors import UPQError

_REASON = 300  # characters of what a library says


@contextmanager
def library_errors(doing: str, remedy: str = "") -> Iterator[None]:
    """Whatever a library raises on a file that a stranger wrote is one line."""
    try:
        yield
    except UPQError:
        raise
    except BaseException as error:
        # A panic of the Rust libraries is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind, text = type(error).__name__, str(error).strip()
        if isinstance(error, OSError | ValueError | ImportError):  # written for people, and at length
            reason = next(iter(text.splitlines()), kind)
        else:
            reason = f"{kind}: {' '.join(text.split())[:_REASON]}"
        raise UPQError(f"{doing}: {reason}{remedy}") from error

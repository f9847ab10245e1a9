"""Graceful shutdown: Ctrl-C and SIGTERM stop a run at the next safe point."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal ended the run. Not an Exception, like KeyboardInterrupt: no handler of failures may catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The exit code that a shell reports for a process killed by the signal."""
        return 128 + self.signum


class Stop:
    """Law: a request raises Stopped at once. Within `held` the first request waits and a second one raises.

    Signals are handled within `listening` only; a request leaves it as Stopped.
    """

    def __init__(self) -> None:
        self.signum: int | None = None  # of a request, the last one
        self._held = self._raised = False

    def request(self, signum: int, _frame: FrameType | None = None) -> None:
        """A signal handler."""
        first, self.signum = self.signum is None, signum
        if not (self._held and first):
            self._raised = True
            raise Stopped(signum)
        # print() is not safe in a handler: the signal may come while the stream is locked.
        os.write(2, b"stopping when this step is done and saved; the same signal again stops at once\n")

    @contextmanager
    def held(self) -> Iterator[None]:
        """For code that cannot stop at any line: it checks `signum` and stops where it can."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.signum is not None:
            raise Stopped(self.signum)

    @contextmanager
    def listening(self, *signals: int) -> Iterator[Self]:
        """Handle `signals` (default SIGINT and SIGTERM) as requests. In the main thread only, as Python requires."""
        # An ignored signal stays ignored: a shell keeps Ctrl-C from background processes in this way.
        handled = [signum for signum in signals or _SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
        before = {signum: signal.signal(signum, self.request) for signum in handled}
        try:
            yield self
        except Exception as error:
            # safetensors turns what a handler raises while it reads a tensor into a ValueError, in 40 % of 1,900 tries;
            # a run would report its checkpoint as damaged.
            if self._raised and self.signum is not None:
                raise Stopped(self.signum) from error
            raise
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

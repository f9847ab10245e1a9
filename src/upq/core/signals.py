"""A run that is asked to end, by Ctrl-C or by SIGTERM, and when it heeds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal ended the run. Like KeyboardInterrupt no Exception: nothing on its way up may take it for a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """As a shell reports a process that the signal has killed."""
        return 128 + self.signum


class Stop:
    """Law: a request raises Stopped at once; within `held` only a second one does, and the first one waits.

    Nothing happens to a process's signals but within `listening`, which a request that was raised leaves as Stopped.
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
        # print() is not safe in a handler: the signal may come while another one holds the stream.
        os.write(2, b"stopping when this step is done and saved; the same signal again stops at once\n")

    @contextmanager
    def held(self) -> Iterator[None]:
        """While what is within cannot be left anywhere: it looks at `signum` and stops where it can."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.signum is not None:
            raise Stopped(self.signum)

    @contextmanager
    def listening(self, *signals: int) -> Iterator[Self]:
        """`signals`, or else SIGINT and SIGTERM, are requests. For the main thread alone, as Python has it."""
        # What is ignored stays so: that is how a shell keeps Ctrl-C from what it runs in the background.
        heard = [signum for signum in signals or _SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
        before = {signum: signal.signal(signum, self.request) for signum in heard}
        try:
            yield self
        except Exception as error:
            # What a handler raises while safetensors reads a tensor comes out as a ValueError of torch's, in 40 % of
            # 1,900 tries; a run would call its checkpoint damaged.
            if self._raised and self.signum is not None:
                raise Stopped(self.signum) from error
            raise
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

"""What a run holds out, to be kept out of other text too. Shape suffixes: N = rows, T = tokens in a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

_WINDOW = 16  # tokens: of which a document has many, and two that have nothing to do with one another rarely one


class HeldOut:
    """The rows that are held out, to look for a text in them."""

    def __init__(self, rows_NT: Tensor) -> None:
        rows = rows_NT.numpy().astype(np.int32)
        self._whole = rows.tobytes()
        windows = np.lib.stride_tricks.sliding_window_view(rows, min(_WINDOW, rows.shape[1]), axis=1)
        self._windows = {window.tobytes() for row in windows for window in row}

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether the tokens stand there one after the other."""
        wanted, at = np.array(ids, np.int32).tobytes(), -1
        while (at := self._whole.find(wanted, at + 1)) >= 0:
            if at % 4 == 0:
                return True
        return False

    def holds_most(self, ids: Sequence[int]) -> bool:
        """Whether most of a document stands there, which rows may have cut. Of a short one, whether all does."""
        found = np.array(ids, np.int32)
        if len(found) < 2 * _WINDOW:
            return self.holds(ids)
        windows = found[: len(found) // _WINDOW * _WINDOW].reshape(-1, _WINDOW)
        return 2 * sum(window.tobytes() in self._windows for window in windows) > len(windows)

"""Answers of a model, kept in a file as they come, so that a test that was stopped goes on.

JSON lines: first what the answers are of, then one line an answer, appended. A line that was torn by a crash is
dropped. Keys are digests of the whole prompt and of the settings of the generation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from upq.core.bounded import read_bytes
from upq.core.errors import UPQError

_FORM = 1


class KeptAnswers:
    """lm-eval's cache hook over such a file. A context manager: the file is open within."""

    def __init__(self, path: Path, of: Mapping[str, Any]) -> None:
        """Raises UPQError for a file that is of something else."""
        self._path = path
        self._of = {"upq_answers": _FORM, **of}
        self._answers: dict[str, dict[str, Any]] = {}
        self._stream: IO[str] | None = None
        self.at_limit: list[bool] = []  # of generated answers that are about to be kept, in order
        self._whole = self._read() if path.exists() else 0

    def __enter__(self) -> KeptAnswers:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._path.open("a", encoding="utf-8")
        self._stream.truncate(self._whole)
        if not self._whole:
            self._write(self._of)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stream is not None
        self._stream.close()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, kind: str, arguments: Any) -> dict[str, Any] | None:
        """`answer`, and for a generated one `at_limit`."""
        return self._answers.get(_key(kind, arguments))

    def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
        """lm-eval's name: one finished answer."""
        kept = {"key": _key(kind, arguments), "answer": answer}
        if kind == "generate_until":
            kept["at_limit"] = self.at_limit.pop(0)
        self._answers[kept["key"]] = kept
        self._write(kept)

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._stream.flush()

    def _read(self) -> int:
        """Bytes of all whole lines."""
        raw = read_bytes(self._path, remedy="is it a file of answers?")
        whole = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check(entry)
                else:
                    self._answers[entry["key"]] = {"answer": entry["answer"], "at_limit": entry.get("at_limit", False)}
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UPQError(f"{self._path}:{number}: no kept answer; remove the file, or name another") from None
        return whole

    def _check(self, of: dict[str, Any]) -> None:
        for key, value in self._of.items():
            if of.get(key) != value:
                raise UPQError(
                    f"{self._path}: holds answers of {key} {of.get(key)!r}, this run has {value!r}; name another file"
                )


def _key(kind: str, arguments: Any) -> str:
    return hashlib.sha256(json.dumps([kind, arguments], sort_keys=True, default=str).encode()).hexdigest()[:32]

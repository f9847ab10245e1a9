"""What `upq bench` makes of the clock: engines that take a known time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny import tiny_artifact
from upq.cli.bench import bench as command
from upq.core.errors import UPQError
from upq.evals import speed as bench
from upq.evals.speed import Engine, Workload

WORK = Workload(prompt=4, tokens=5, prefill=10, repeats=3)


class Machine:
    """A clock, and engines that let it go on; its pace changes with every round."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int, int]] = []

    def clock(self) -> float:
        return self.now

    def engine(self, name: str, *, a_token: float, a_prompt_token: float, **sizes: int) -> Engine:
        def run(ids: list[int], tokens: int, clock: Callable[[], float]) -> list[float]:
            pace = 1 + len(self.calls) // 4  # four calls a round
            self.calls.append((name, len(ids), tokens))
            times = [clock()]
            self.now += pace * a_prompt_token * len(ids)
            times.append(clock())
            for _ in range(tokens - 1):
                self.now += pace * a_token
                times.append(clock())
            return times

        return Engine(name, run, **sizes)


def test_engines_run_in_turns_and_ratios_are_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    fast = machine.engine("fast", a_token=1, a_prompt_token=0.5, weight_bytes=800, cache_bytes=10)
    slow = machine.engine("slow", a_token=3, a_prompt_token=1)

    def read(run: object, clock: object) -> float:
        return 2.0

    monkeypatch.setattr(bench, "_seconds", read)
    (first, second), rate = bench.measure([fast, slow], WORK, 100, clock=machine.clock)
    rounds = [("fast", 4, 5), ("fast", 10, 1), ("slow", 4, 5), ("slow", 10, 1)]
    assert machine.calls == 4 * rounds  # three repeats after one to warm up
    assert first.decode == pytest.approx(1 / 3)  # the paces were 2, 3, 4
    assert second.decode == pytest.approx(1 / 9)
    assert first.first_token == pytest.approx(3 * 0.5 * 10)
    assert first.prefill == pytest.approx(10 / first.first_token)
    assert (first.decode_ratio, first.prefill_ratio) == (1, 1)
    assert second.decode_ratio == pytest.approx(3)
    assert second.prefill_ratio == pytest.approx(2)
    assert first.bytes_per_token == 800 + 10 * (4 + 2)
    assert first.of_stream == pytest.approx(first.decode * 860 / rate)
    assert (second.bytes_per_token, second.of_stream) == (None, None)


def test_what_is_missing_for_a_comparison_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UPQError, match="llama-cpp-python is not installed; pip install"):
        bench.check_llama_cpp()


def test_a_family_that_is_not_compiled_is_measured_in_transformers_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figures = tiny_artifact(tmp_path / "a", "gemma2"), tmp_path / "figures.json"
    command(str(out), None, 3, 4, 10, 1, None, "w2a8", figures)
    measured = json.loads(figures.read_text())
    reason = "the family gemma2 is not compiled"
    assert (measured["decoder"], measured["why_not_compiled"]) == ("transformers", reason)
    assert [engine["name"] for engine in measured["engines"]] == ["transformers"]
    shown = " ".join(capsys.readouterr().out.split())  # lines break at the terminal's width
    assert f"decoder: transformers' loop with the packed kernels: {reason}" in shown

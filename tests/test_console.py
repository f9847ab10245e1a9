"""The estimate of the remaining time, and what is printed where there is no terminal."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

import upq
from upq.cli.compare import _differences
from upq.cli.console import size, table
from upq.run.console import console, styled
from upq.run.reporter import Estimate, LiveBars, PlainLines, duration, loading, reporter


def test_nothing_is_estimated_before_anything_is_measured():
    assert Estimate(costs={"a": (10, 100.0)}).remaining() is None


def test_a_stage_to_come_is_judged_by_its_cost_at_the_pace_so_far():
    estimate = Estimate(costs={"a": (10, 100.0), "b": (5, 300.0)})
    estimate.measured["a"], estimate.finished["a"] = (4, 8.0), 4  # 2 s a unit, 0.2 s a cost unit
    assert estimate.remaining() == pytest.approx(6 * 2 + 300 * 0.2)


def test_a_stage_under_way_is_judged_by_its_own_pace():
    estimate = Estimate(costs={"a": (10, 100.0), "b": (5, 300.0)})
    estimate.measured |= {"a": (10, 20.0), "b": (1, 5.0)}
    estimate.finished |= {"a": 10, "b": 1}
    assert estimate.remaining() == pytest.approx(4 * 5)


def test_work_of_an_earlier_run_is_neither_left_nor_measured():
    estimate = Estimate(costs={"a": (10, 100.0)})
    estimate.finished["a"], estimate.measured["a"] = 9, (1, 3.0)
    assert estimate.remaining() == pytest.approx(3)


def test_a_stage_without_cost_says_nothing_about_the_others():
    estimate = Estimate(costs={"data": (10, 0.0), "train": (5, 300.0)})
    estimate.measured["data"], estimate.finished["data"] = (10, 4.0), 10
    assert estimate.remaining() is None


def test_plain_lines_have_no_control_characters_and_end_each_stage():
    out = io.StringIO()
    with PlainLines(Console(file=out, width=40), every=1e9) as progress:
        progress.plan({"int4": (3, 1.0), "distill": (100, 1.0)})
        progress.start("int4")
        for _ in range(3):
            progress.advance(error=0.25)
        progress.start("distill", done=98)
        progress.advance(2, loss=1.5)
        progress.note("a note that is longer than the forty columns of this console")
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert lines[0] == "int4: 0/3"
    assert lines[1].startswith("int4: 3/3  error 0.25")
    assert lines[2] == "distill: 98/100"
    assert lines[3].startswith("distill: 100/100  loss 1.5")
    assert lines[4].endswith("columns of this console")  # one line, however narrow the console


def test_bars_only_on_a_terminal():
    assert isinstance(reporter(Console(file=io.StringIO(), force_terminal=True)), LiveBars)
    assert isinstance(reporter(Console(file=io.StringIO())), PlainLines)


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (61, "1:01"), (3600, "1:00:00"), (86399.6, "24:00:00")])
def test_duration(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(12, "12 B"), (205_000, "205 kB"), (1.04e6, "1.04 MB"), (3.2e12, "3.2 TB")]
)
def test_size(count, shown):
    assert size(count) == shown


PATHS = ["out [v2]", "a[/b]", "a[bold]b", ":smile: [link=x]", "[/]", "a\\[b", "half \udcff"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_path_is_shown_as_it_is(path, terminal, capsys, monkeypatch):
    """By all that prints one: lines, notes, tables, rules, questions, and what shows that something is loaded."""
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    shown = console()
    assert shown.is_terminal == terminal
    shown.print(styled((path, "bold"), f" is ready: {path}"), soft_wrap=True)
    shown.print(table(path if path.isprintable() else "", [styled(path)], [[styled(path)]]))
    with reporter(shown) as progress:
        progress.note(f"{path}: a note")
    with loading(what=path):
        pass
    out = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    written = path.encode("unicode_escape").decode() if "\udcff" in path else path
    assert f"{written} is ready: {written}" in out
    assert f"{written}: a note" in out
    assert out.count(written) >= 5


def test_one_place_makes_a_console():
    """With markup off. A string with tags would be shown with them, so none is written."""
    for file in Path(upq.__file__).parent.rglob("*.py"):
        text = file.read_text()
        if file.name != "console.py" or file.parent.name != "run":
            assert not re.search(r"[^.\w]Console\(|from_markup|rich\.markup", text), file
        assert not re.search(r"\[/(bold|dim|red|green|yellow|cyan)", text), file


def test_no_cell_is_cut_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    columns = ["model", "size", "bits a weight", "perplexity", "KL to original", "same top-1"]
    rows = [
        ["original", "144 kB", "32.00", "388.226", "–", "–"],
        ["after int4", "77.4 kB", "2.44", "4.5", "0.5", "99.1%"],
    ]
    console().print(table("", columns, rows))
    out = capsys.readouterr().out
    assert "…" not in out
    assert all(cell in out for row in rows for cell in row)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_differences_are_whole_at_any_width(width: int) -> None:
    """No cell is cut, and words have room to be read: where a table is too wide, a measure has its figures below it."""
    columns = ["models", "measure", "change", "95 % interval", "alone", "odds ratio", "p", "p (Holm)", "verdict"]
    rows = [
        ["a → b", "mini_mmlu acc", "+0.2%", "-0.5% to +0.9%", "13 / 25", "1.9 (0.94 to 4.1)", "0.073", "0.15", "no"],
        ["a → b", "t.txt: KL to the original", "-0.1290", "-0.1378 to -0.1200", *"––––", "b is better"],
    ]
    out = io.StringIO()
    Console(file=out, width=width).print(_differences({"columns": columns, "rows": rows}, width))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    flat = " ".join(" ".join(lines).replace("│", " ").split())
    assert "…" not in flat
    assert all(cell in flat for row in rows for cell in row if cell not in ("–", rows[1][1]))

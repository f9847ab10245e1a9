"""The page of a run that is finished, of one that was interrupted, and of an artefact that has no metrics."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("vl_convert", reason="vl-convert-python is not installed: pip install 'upq[report]'")

from tiny import tiny_artifact
from upq.cli import app
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.reports import charts, page
from upq.reports.comparison import Request, compare
from upq.reports.facts import engines, facts
from upq.reports.make import make
from upq.run.run import quantize
from victim import STEPS, Victim, make_victim

SECTIONS = [name for name, _ in page._SECTIONS]
PROMPTS = "Where is the river?\n\nName three geese.\n"


class Stops(Silent):
    """Interrupts a run in its training."""

    steps = 0

    def start(self, stage: str, *, done: int = 0) -> None:
        self.stage = stage

    def advance(self, units: int = 1, **figures: float) -> None:
        self.steps += self.stage == "distill"
        if self.steps == 5:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def victim(folder: Path) -> Victim:
    return make_victim(folder / "victim")


@pytest.fixture(scope="module")
def interrupted(victim: Victim, folder: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        quantize(victim.model, victim.recipe("export=[]"), folder / "interrupted", progress=Stops())
    return folder / "interrupted"


@pytest.fixture(scope="module")
def finished(victim: Victim, folder: Path) -> Path:
    quantize(victim.model, victim.recipe("export=[]"), folder / "finished")
    return folder / "finished"


@pytest.fixture(scope="module")
def pages(victim: Victim, interrupted: Path, finished: Path, folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By kind: the page, and the facts that it shows. All three with the command."""
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "text.txt").write_text("The fox saw nine geese by the river, and <b>two</b> bears. " * 20)
    bare = tiny_artifact(folder / "bare")
    compared = ["--against", victim.model, "--prompts", folder / "prompts.txt", "--text", folder / "text.txt"]
    found = {}
    for name, directory, options in (
        ("finished", finished, compared),
        ("interrupted", interrupted, []),
        ("bare", bare, []),
    ):
        out, figures = folder / f"{name}.html", folder / f"{name}.json"
        arguments = ["report", directory, *options, "--out", out, "--json", figures]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        found[name] = out, json.loads(figures.read_text())
    return found


class Outline(HTMLParser):
    """Ids of sections, tables and scripts, and every address that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.charts: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "section":
            self.sections.append(given["id"] or "")
        if tag == "figure":
            self.charts.append(given["id"] or "")
        if tag in ("link", "script", "img", "iframe") and (url := given.get("href") or given.get("src")):
            self.fetched.append(url)


@pytest.mark.parametrize("kind", ["finished", "interrupted", "bare"])
def test_a_page_is_whole(pages: dict[str, tuple[Path, dict[str, Any]]], kind: str) -> None:
    path, found = pages[kind]
    html, outline = path.read_text(), Outline()
    outline.feed(html)
    assert outline.sections == SECTIONS
    assert len(html.encode()) < page.LIMIT
    assert all(url.startswith("data:") for url in outline.fetched)
    with_figures = {
        "finished": {"layers", "blocks", "steps-loss", "steps-lr", "steps-grad_norm", "positions", "kinds", "clocks",
                     "memory"},
        "interrupted": {"layers", "blocks", "steps-loss", "steps-lr", "steps-grad_norm", "clocks", "memory"},
        "bare": set(),
    }[kind]  # fmt: skip
    assert {name.removeprefix("chart-") for name in outline.charts} == with_figures
    assert all(chart.spec["data"]["values"] and chart.rows for chart in charts.charts(found).values())
    assert ("not recorded" in html) == (kind != "finished")


def test_the_facts_are_those_of_the_run(pages: dict[str, tuple[Path, dict[str, Any]]], finished: Path) -> None:
    found, going = pages["finished"][1], pages["interrupted"][1]
    manifest = json.loads((finished / "upq.json").read_text())
    assert found["models"] == manifest["metrics"]
    assert [layer["error"] for layer in found["layers"]] == [layer["error"] for layer in manifest["layers"]]
    assert [step["step"] for step in found["steps"]] == list(range(STEPS))
    assert going["steps"] == [{**step, "seconds": here["seconds"]} for step, here in
                              zip(found["steps"], going["steps"], strict=False)]  # fmt: skip
    assert len(going["steps"]) == 5
    errors = [{(each["block"], each["linear"]): each["error"] for each in of["layers"]} for of in (found, going)]
    assert errors[0] == errors[1]
    assert going["state"] == "not finished; the last stage that was begun is distill"
    assert found["speed"]["decode"] > 0
    assert found["texts"][0]["kld"] > 0


def test_where_two_answers_differ(pages: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    path, found = pages["finished"]
    assert [each["prompt"] for each in found["prompts"]] == ["Where is the river?", "Name three geese."]
    for each in found["prompts"]:
        original, artifact = (each["answers"][name]["tokens"] for name in ("original", "artifact"))
        at = each["diverges_at"]
        assert each["same"] == (at is None)
        if at is not None:
            assert original[:at] == artifact[:at]
        for answer in each["answers"].values():
            assert len(answer["kld"]) == len(answer["tokens"])
            assert all(kld >= -1e-6 for kld in answer["kld"])
    assert path.read_text().count("first difference: ") == sum(
        each["diverges_at"] is not None and each["diverges_at"] < len(answer["tokens"])
        for each in found["prompts"]
        for answer in each["answers"].values()
    )


def test_many_steps_become_their_means() -> None:
    steps = [{"stage": "distill", "step": i, "tokens": i, "loss": float(i % 4)} for i in range(4 * charts.POINTS)]
    chart = charts.curve(steps, "loss", "Loss", "nats")
    assert chart is not None
    assert {point["loss"] for point in chart.spec["data"]["values"]} == {1.5}
    assert len(chart.rows) == charts.POINTS


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, ["absent"], "absent: no such directory"),
        ({}, ["."], "no artefact and no run of upq is here"),
        ({"p.txt": "Hi"}, ["bare", "--prompts", "p.txt"], "add --against org/tiny"),
        ({}, ["bare", "--against", "m"], "give --text FILE or --prompts FILE"),
        ({"p.txt": " \n\n"}, ["bare", "--against", "m", "--prompts", "p.txt"], "p.txt: no prompt in it"),
        ({"p.jsonl": '{"prompt": 3}'}, ["bare", "--against", "m", "--prompts", "p.jsonl"], "p.jsonl:1: expected"),
        ({"p.txt": "a\n" * 41}, ["bare", "--against", "m", "--prompts", "p.txt"], "41 prompts, a page has room for 40"),
        ({}, ["bare", "--against", "m", "--text", "t.txt"], "--text t.txt: no such file"),
        ({}, ["bare", "--out", "absent/x.html"], "--out absent/x.html: no such directory"),
        ({}, ["bare", "--out", "."], "--out .: is a directory"),
        ({"bare/eval.json": "[]"}, ["bare"], "no figures of upq eval"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    files: dict[str, str], arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_artifact(tmp_path / "bare")
    for name, content in files.items():
        Path(name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["report", *arguments])
    assert isinstance(result.exception, UPQError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    bare = tiny_artifact(tmp_path / "bare")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["report", str(bare), "--out", "/dev/full", "--json", str(tmp_path / "figures.json")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UPQError)
    assert "/dev/full: cannot write: no space left on the device" in str(result.exception)
    assert sorted(tmp_path.rglob("*")) == before


def test_figures_of_upq_eval_stand_in_the_page(tmp_path: Path) -> None:
    bare = tiny_artifact(tmp_path / "bare")
    for name, acc in (("eval.json", 0.75), ("eval-original.json", 0.875)):
        tasks = {"mmlu": {"acc": acc, "acc_stderr": 0.01, "samples": 100}}
        (bare / name).write_text(json.dumps({"ppl": 3.0, "tasks": tasks}))
    found, html = make(bare, progress=Silent())
    assert found["models"]["artifact"]["tasks"]["mmlu"]["acc"] == 0.75
    assert "75.0% ± 2.0%" in html
    assert "87.5% ± 2.0%" in html


def test_a_model_and_itself_show_no_difference(victim: Victim, finished: Path, folder: Path) -> None:
    (folder / "long.txt").write_text("".join(f"The {i}th fox saw {i * 7} geese. " for i in range(200)))
    request = Request(texts=(folder / "long.txt",), against=str(victim.model))
    same = compare([str(finished), str(finished)], request, Silent())
    assert same["names"] == ["finished", "finished (2)"]
    assert {pair["verdict"] for pair in same["pairs"]} == {"no difference shown"}
    assert [pair["difference"] for pair in same["pairs"]] == [0.0, 0.0]
    other = compare([str(finished), str(victim.model)], request, Silent())
    kl = other["pairs"][1]
    assert kl["verdict"] == "model is better"
    assert kl["mean_b"] == 0.0
    html = page.comparison(other)
    outline = Outline()
    outline.feed(html)
    assert outline.sections == ["scores", "differences", "answers"]
    assert outline.charts == ["chart-differences"]


def test_compare_on_a_task(victim: Victim, finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'upq[eval]'")
    folder = tmp_path / "data" / "mmlu"
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        rows = "".join(f"Is it {i}?,a,b,c,d,{i % 4}\n" for i in range(8))
        (folder / split / f"anatomy_{split}.csv").write_text(f"question,choice0,choice1,choice2,choice3,answer\n{rows}")
    request = Request(tasks=("mmlu_anatomy",), data_dir=tmp_path / "data", answers=tmp_path / "answers")
    found = compare([str(finished), str(finished), str(victim.model)], request, Silent())
    assert [pair["measure"] for pair in found["pairs"]] == ["mmlu_anatomy acc"] * 3
    first, second, _ = found["pairs"]
    assert (first["a"], first["b"], first["p"]) == ("finished", "finished (2)", 1.0)
    assert len(list((tmp_path / "answers").iterdir())) == 2  # a file a model, whatever it is called

    assert len(found["changed"]) == second["only_a"] + second["only_b"]


@pytest.mark.parametrize(
    ("models", "request_", "message"),
    [
        (["a"], Request(tasks=("mmlu",)), "two models or more"),
        (["a", "b"], Request(), "nothing to compare on"),
        (["a", "b"], Request(texts=(Path("absent.txt"),)), "absent.txt: no such file"),
        (["a", "b"], Request(tasks=("mmlu",), against="m"), "give --text FILE as well"),
        (["a", "b"], Request(tasks=("mmlu",), data_dir=Path("absent")), "no such directory"),
    ],
)
def test_bad_comparisons_fail_before_a_model_is_read(models: list[str], request_: Request, message: str) -> None:
    with pytest.raises(UPQError, match=re.escape(message)):
        compare(models, request_, Silent())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'"
    )
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("finished", "light"),
        ("bare", "dark"),
        *(
            pytest.param(*each, marks=pytest.mark.nightly)
            for each in (("finished", "dark"), ("bare", "light"), ("interrupted", "light"), ("interrupted", "dark"))
        ),
    ],
)
def test_a_browser_shows_it(
    browser: Any, pages: dict[str, tuple[Path, dict[str, Any]]], kind: str, scheme: str, tmp_path: Path
) -> None:
    """On a phone: charts drawn, nothing fetched, nothing complained of, by axe-core neither; then on paper."""
    path, found = pages[kind]
    tab = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    said, fetched = list[str](), list[str]()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: fetched.append(request.url))
    tab.goto(path.as_uri())
    drawn, expected = tab.locator("figure.chart svg"), len(charts.charts(found))
    tab.wait_for_function(f"document.querySelectorAll('figure.chart svg').length === {expected}")
    marks = "svg path, svg rect, svg circle"
    assert all(
        drawn.nth(i).evaluate(f"svg => svg.parentElement.querySelectorAll('{marks}').length > 3")
        for i in range(expected)
    )
    assert [url for url in fetched if not url.startswith("data:")] == [path.as_uri()]
    assert said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(15, 19, 24)")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    violations = axe.Axe().run(tab).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"][:200]) for each in violations] == []
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.locator("nav").is_visible()
    tab.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 10_000


def test_facts_need_an_artefact_or_a_run(tmp_path: Path) -> None:
    with pytest.raises(UPQError, match="no artefact and no run"):
        facts(tmp_path)


def test_every_format_of_export_says_where_it_runs() -> None:
    found = engines()
    assert len(found) > 5
    assert all(engine["runs_in"] and engine["run"] for engine in found)

"""`upq.report` and `upq.compare`: what the two commands call. The other functions are in `upq/run/api.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from upq.core.errors import UPQError
from upq.core.paths import local, local_or_hub
from upq.files.target import Target
from upq.run.api import device_of
from upq.run.reporter import loading, reporting

if TYPE_CHECKING:
    from upq.core.progress import Progress


@dataclass(frozen=True, slots=True)
class Page:
    """A page that was written."""

    path: Path
    bytes: int
    figures: Mapping[str, Any]  # all that it shows, as `upq report --json` writes it


class Comparison(TypedDict):
    """What `compare` returns, and `upq compare --json` writes."""

    names: list[str]
    models: list[str]  # as they were given
    against: str | None
    tasks: dict[str, dict[str, dict[str, float]]]  # by name and task, with lm-eval's names of metrics
    scores: dict[str, Any]  # the table of scores: `columns` and `rows` of text
    pairs: list[dict[str, Any]]  # a measure of two models: `upq.evals.paired.Paired`, a, b, measure, verdict, p_holm
    differences: dict[str, Any]  # the table of `pairs`
    changed: list[dict[str, Any]]  # items that are right in one model and wrong in another, the first of them
    changed_all: int
    asked_tasks: bool
    resamples: int  # of the bootstrap


def report(
    directory: str | Path,
    *,
    against: str | Path | None = None,
    prompts: str | Path | None = None,
    text: str | Path | Sequence[str | Path] = (),
    out: str | Path | None = None,
    progress: Progress | Literal["auto"] | None = "auto",
) -> Page:
    """Write one HTML file about a run: size, quality, errors of layers, training, where answers differ, how to use it.

    >>> upq.report("qwen-2bit", against="Qwen/Qwen3-0.6B", prompts="prompts.txt").path

    directory: the `out` of `quantize`; finished, under way or interrupted.
    against: the model it was made from, for `prompts` and `text`.
    prompts: a file with a prompt a line, or JSON lines; both models answer them.
    text: text files to compare both models on, a kind of text each.
    out: the page; None: report.html in the directory.
    progress: as for `quantize`, but on stderr.

    Returns the page's path, its bytes and its figures. Raises UPQError, with nothing written, for bad input.
    Needs `pip install 'upq[report]'`.
    """
    folder = local(directory)
    if not folder.is_dir():
        raise UPQError(f"{directory}: no such directory; name the --out of upq quantize")
    page = Target.of(folder / "report.html" if out is None else local(out), "--out")
    assert page.path is not None
    with loading(progress):
        from upq.reports.make import make
        from upq.run.quiet import quietly

    with quietly(), reporting(progress, stderr=True) as shown:
        figures, html = make(
            folder,
            against=None if against is None else local_or_hub(against),
            prompts=None if prompts is None else local(prompts),
            texts=_paths(text),
            progress=shown,
        )
    page.write_text(html)
    return Page(page.path, len(html.encode()), figures)


def compare(
    *models: str | Path,
    tasks: str | Sequence[str] = (),
    text: str | Path | Sequence[str | Path] = (),
    against: str | Path | None = None,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    batch_size: int = 4,
    answers: str | Path | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    progress: Progress | Literal["auto"] | None = "auto",
) -> Comparison:
    """Compare models item by item: paired differences with 95 % intervals, which answers changed, loops and cuts.

    >>> found = upq.compare("a-2bit", "b-2bit", tasks="mmlu,ifeval", text="held-out.txt")
    >>> [(pair["measure"], pair["verdict"]) for pair in found["pairs"]]

    models: two or more directories or hub ids, artefacts or originals. One is in memory at a time.
    tasks: names of lm-eval's tasks, as a list or separated by commas. Needs `pip install 'upq[eval]'`.
    text: text files; an item is a row of at most 512 tokens.
    against: an original; with it the KL to it is a measure on each text.
    data_dir, limit, samples, temperature, batch_size: as for `evaluate`.
    answers: a directory that keeps answers, a file for each model; the same call goes on where it stopped.
    device: "auto", "cpu" or "cuda".
    out: an HTML page to write as well.
    progress: as for `quantize`, but on stderr.

    Returns scores, pairs with verdicts, and answers that changed. Raises UPQError for bad input, before a model is
    loaded where that can be seen. Needs `pip install 'upq[report]'`.
    """
    page = Target.of(None if out is None else local(out), "--out")
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    with loading(progress):
        from upq.evals.code import Samples
        from upq.reports import comparison
        from upq.reports import page as pages
        from upq.run.quiet import quietly

    if page.path is not None:
        pages.check_packages()
    request = comparison.Request(
        tasks=tuple(names),
        texts=tuple(_paths(text)),
        against=None if against is None else local_or_hub(against),
        data_dir=None if data_dir is None else local(data_dir),
        limit=limit,
        batch_size=batch_size,
        answers=None if answers is None else local(answers),
        device=device_of(device),
        samples=Samples.of(samples, temperature),
    )
    with quietly(), reporting(progress, stderr=True) as shown:
        found = comparison.compare([local_or_hub(model) for model in models], request, shown)
    if page.path is not None:
        page.write_text(pages.comparison(found))
    return cast(Comparison, found)


def _paths(text: str | Path | Sequence[str | Path]) -> list[Path]:
    return [local(each) for each in ([text] if isinstance(text, str | Path) else text)]

"""The report of a directory: what is there, what is measured for it, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from upq.artifact.manifest import MANIFEST
from upq.core.errors import UPQError
from upq.core.progress import Progress
from upq.reports import page
from upq.reports.facts import Facts, facts
from upq.reports.measured import Pair, of_prompts, of_speed, of_text, read_prompts, text_rows


def make(
    directory: Path,
    *,
    against: str | None = None,
    prompts: Path | None = None,
    texts: Sequence[Path] = (),
    progress: Progress,
) -> tuple[Facts, str]:
    """The facts, and the page. Raises UPQError, before a model is loaded where that can be seen."""
    page.check_packages()
    found = facts(directory)
    finished = (directory / MANIFEST).is_file()
    if (prompts or texts) and against is None:
        original = found["original"] or "the model it was made from"
        raise UPQError(f"--prompts and --text compare with the original; add --against {original}")
    if against is not None and not (prompts or texts):
        raise UPQError("--against compares on text or prompts; give --text FILE or --prompts FILE as well")
    if against is not None and not finished:
        raise UPQError(
            f"{directory}: the run is not finished, so there is no model to compare yet; leave out --against"
        )
    asked = [] if prompts is None else read_prompts(prompts)
    for text in texts:
        if not text.is_file():
            raise UPQError(f"--text {text}: no such file")
    if finished:
        progress.note("measuring the speed")
        found["speed"] = of_speed(directory)
    if against is not None:
        pair = Pair.load(directory, against, progress)
        rows = {str(text): text_rows(text, pair) for text in texts}
        progress.plan({"text": (len(rows), 1.0), "prompts": (len(asked), 1.0)})
        progress.start("text")
        for name, tokens_NT in rows.items():
            found["texts"].append(of_text(Path(name).name, tokens_NT, pair))
            progress.advance(1)
        progress.start("prompts")
        found["prompts"] = list(of_prompts(asked, pair, progress))
    return found, page.report(found)

"""Two or more models on the same items: scores, paired differences, and the answers that changed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.artifact.manifest import MANIFEST, read_manifest, verify
from upq.core.errors import UPQError
from upq.core.memory import give_back
from upq.core.precision import dtype_name, to_compute_dtype
from upq.core.progress import Progress
from upq.data import load_eval_text
from upq.evals.code import ONE, Samples
from upq.evals.items import Item
from upq.evals.paired import LEVEL, NO_DIFFERENCE, RESAMPLES, check_packages, holm, paired
from upq.evals.tasks import evaluate_tasks
from upq.evals.text import ByToken, evaluate_text
from upq.files.digests import digest_model_dir
from upq.kernels import computing
from upq.model.loading import context_of, load_model, load_tokenizer
from upq.reports.measured import LENGTH

SHOWN = 60  # items that changed, on a page and in the JSON file
_CUT = 2000  # characters of a question or an answer that are shown

Scores = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compare on. `against`: an original, for the KL of the texts; `answers`: a folder that keeps answers."""

    tasks: tuple[str, ...] = ()
    texts: tuple[Path, ...] = ()
    against: str | None = None
    data_dir: Path | None = None
    limit: int | None = None
    batch_size: int = 4
    answers: Path | None = None
    device: str = "cpu"
    samples: Samples = ONE  # of tasks whose answers are programs


@dataclass
class Measured:
    """Of one model: by measure the scores of items, in the same order for all. `items` are those of tasks."""

    name: str
    path: str
    scores: Scores = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


def compare(models: Sequence[str], request: Request, progress: Progress) -> dict[str, Any]:
    """Everything that the table and the page show, as JSON types.

    Raises UPQError for bad input: before a model is loaded, where that can be seen.
    """
    return together(measure(models, request, progress), request)


def measure(models: Sequence[str], request: Request, progress: Progress) -> list[Measured]:
    """The scores of every item, model by model. One model is in memory at a time. Raises UPQError as `compare` does."""
    _check(models, request)
    names = _names(models)
    rows: dict[Path, Tensor] = {}
    found = []
    with ExitStack() as stack:
        folder = request.answers or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="upq-answers-")))
        stack.enter_context(computing("reference"))  # it compares weights, not kernels
        original = (
            None if request.against is None else to_compute_dtype(load_model(request.against, device=request.device))
        )
        for name, path in zip(names, models, strict=True):
            progress.note(f"loading {path}")
            if (Path(path) / MANIFEST).is_file():
                verify(Path(path), read_manifest(Path(path)))
            model, tokenizer = to_compute_dtype(load_model(path, device=request.device)), load_tokenizer(path)
            measured = Measured(name, path)
            for text in request.texts:
                _on_text(measured, text, rows, model, original, tokenizer, request)
            if request.tasks:
                _on_tasks(measured, folder, model, tokenizer, request, progress)
            found.append(measured)
            del model
            give_back()
    return found


def _check(models: Sequence[str], request: Request) -> None:
    check_packages()
    if len(models) < 2:
        raise UPQError("compare needs two models or more; upq eval measures one")
    if not request.tasks and not request.texts:
        raise UPQError("nothing to compare on: give --tasks mmlu,ifeval, --text FILE, or both")
    if request.against is not None and not request.texts:
        raise UPQError("--against is for the KL on a text: give --text FILE as well")
    for text in request.texts:
        if not text.is_file():
            raise UPQError(f"--text {text}: no such file")
    if request.data_dir is not None and not request.data_dir.is_dir():
        raise UPQError(f"--data-dir {request.data_dir}: no such directory")
    if request.answers is not None and request.answers.exists() and not request.answers.is_dir():
        raise UPQError(f"--answers {request.answers}: is a file; name a directory, each model has a file in it")


def _names(models: Sequence[str]) -> list[str]:
    """The last parts of the paths where these differ, else the paths; a model that comes twice is numbered."""
    last = [Path(model).resolve().name if Path(model).is_dir() else model for model in models]
    names = last if len(set(last)) == len(set(models)) else list(models)
    return [
        name if n == names.index(name) else f"{name} ({names[: n + 1].count(name)})" for n, name in enumerate(names)
    ]


def _on_text(
    measured: Measured,
    text: Path,
    rows: dict[Path, Tensor],
    model: PreTrainedModel,
    original: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
) -> None:
    """Means over the tokens of each row."""
    length = rows[text].shape[1] if text in rows else min(LENGTH, context_of(model.config) or LENGTH)
    tokens_NT = load_eval_text(text, tokenizer, length)
    if text in rows and not tokens_NT.equal(rows[text]):
        raise UPQError(
            f"--text {text}: {measured.path} has other tokens than the first model, so rows are no pairs; use --tasks"
        )
    rows[text] = tokens_NT
    kept = ByToken(tokens_NT)
    evaluate_text(model, tokens_NT, teacher=original, batch_size=request.batch_size, keep=kept)
    measured.scores[f"{text.name}: -log p, nats a token"] = kept.nll_NT.nanmean(1).tolist()
    if original is not None:
        measured.scores[f"{text.name}: KL to the original"] = kept.kld_NT.nanmean(1).tolist()


def _on_tasks(
    measured: Measured,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    progress: Progress,
) -> None:
    path = measured.path
    digest = digest_model_dir(Path(path)) if Path(path).is_dir() else f"{path}@{model.config._commit_hash}"
    of = {"model": digest, "dtype": dtype_name(model.dtype), "compute": "reference"}
    measured.tasks = evaluate_tasks(
        model,
        tokenizer,
        request.tasks,
        data_dir=request.data_dir,
        limit=request.limit,
        batch_size=request.batch_size,
        answers=folder / f"{digest.replace('/', '-')[:40]}.jsonl",
        of=of,
        progress=progress,
        items=measured.items,
        samples=request.samples,
    )
    for item in measured.items:
        measured.scores.setdefault(f"{item.asked} {item.measure}", []).append(item.score)


def together(found: Sequence[Measured], request: Request) -> dict[str, Any]:
    """What `compare` returns, of models that were measured on the same items."""
    first = found[0]
    for other in found[1:]:
        assert [item.key for item in other.items] == [item.key for item in first.items]
    pairs = _corrected(
        [_pair(a, b, measure, named=len(found) > 2) for a, b in combinations(found, 2) for measure in first.scores]
    )
    changed = _changed(found)
    return {
        "names": [each.name for each in found],
        "models": [each.path for each in found],
        "against": request.against,
        "tasks": {each.name: each.tasks for each in found},
        "scores": _scores(found),
        "pairs": pairs,
        "differences": _differences(pairs, named=len(found) > 2),
        "changed": changed[:SHOWN],
        "changed_all": len(changed),
        "asked_tasks": bool(request.tasks),
        "resamples": RESAMPLES,
    }


def _pair(a: Measured, b: Measured, measure: str, *, named: bool) -> dict[str, Any]:
    result = paired(a.scores[measure], b.scores[measure])
    better = b if (result.difference < 0) == _less_is_better(measure) else a
    verdict = f"{better.name} is better" if result.shown else NO_DIFFERENCE
    return {"a": a.name, "b": b.name, "named": named, "measure": measure, **asdict(result), "verdict": verdict}


def _corrected(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With `p_holm`, over all rows that have a p: what one shows by chance alone shows no difference."""
    exact = [pair for pair in pairs if pair["p"] is not None]
    for pair, p in zip(exact, holm([pair["p"] for pair in exact]), strict=True):
        pair["p_holm"] = p
        if p >= 1 - LEVEL:
            pair["verdict"] = NO_DIFFERENCE
    return [{"p_holm": None, **pair} for pair in pairs]


def _less_is_better(measure: str) -> bool:
    """Of texts' figures, and of the measures of lm-eval that are no scores."""
    return measure.endswith(("nats a token", "KL to the original")) or "perplexity" in measure


def _scores(found: Sequence[Measured]) -> dict[str, Any]:
    """A row a measure; then how many answers loop or are cut."""
    rows = [
        [measure, f"{len(scores):,}", *(_mean(each.scores[measure], scores) for each in found)]
        for measure, scores in found[0].scores.items()
    ]
    for title, count in (("answers cut at the limit", "at_limit"), ("answers that loop", "loops")):
        answers = [{(i.task, i.id): getattr(i, count) for i in each.items} for each in found]
        if found[0].items:
            rows.append([title, f"{len(answers[0]):,}", *(f"{sum(of.values()):,}" for of in answers)])
    return {"columns": ["measure", "items", *(each.name for each in found)], "rows": rows}


def _mean(scores: Sequence[float], example: Sequence[float]) -> str:
    mean = sum(scores) / len(scores)
    return f"{mean:.1%}" if set(example) <= {0.0, 1.0} else f"{mean:.4f}"


def _differences(pairs: Sequence[Mapping[str, Any]], *, named: bool) -> dict[str, Any]:
    rows = []
    for pair in pairs:
        shares = pair["p"] is not None
        style = "+.1%" if shares else "+.4f"
        change = f"{pair['only_a']} / {pair['only_b']}" if shares else "–"
        row = [f"{pair['a']} → {pair['b']}"] * named + [pair["measure"], f"{pair['difference']:{style}}"]
        row += [f"{pair['low']:{style}} to {pair['high']:{style}}", change]
        odds = _odds(pair) if shares else "–"
        exact = [f"{pair['p']:.2g}", f"{pair['p_holm']:.2g}"] if shares else ["–", "–"]
        rows.append([*row, odds, *exact, pair["verdict"]])
    columns = ["measure", "change", "95 % interval", "alone", "odds ratio", "p", "p (Holm)", "verdict"]
    return {"columns": ["models"] * named + columns, "rows": rows}


def _odds(pair: Mapping[str, Any]) -> str:
    """B's odds where one alone is right, with their interval."""
    if not pair["only_a"] + pair["only_b"]:
        return "–"
    ratio, high = ("∞" if pair[key] is None else f"{pair[key]:.2g}" for key in ("odds", "odds_high"))
    return f"{ratio} ({pair['odds_low']:.2g} to {high})"


def _changed(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Items that are right for one and wrong for another, a task and an item once."""
    changed: dict[tuple[str, int], dict[str, Any]] = {}
    for of_models in zip(*(each.items for each in found), strict=True):
        scores = {item.score for item in of_models}
        item: Item = of_models[0]
        if scores == {0.0, 1.0} and (item.task, item.id) not in changed:
            changed[item.task, item.id] = {
                "task": item.task,
                "measure": item.measure,
                "id": item.id,
                "question": item.question[-_CUT:],
                "sides": [
                    {
                        "name": each.name,
                        "right": answer.score == 1.0,
                        "answer": answer.answer[:_CUT].strip(),
                        "at_limit": answer.at_limit,
                        "loops": answer.loops,
                    }
                    for each, answer in zip(found, of_models, strict=True)
                ],
            }
    return list(changed.values())

"""Benchmarks through lm-eval: any of its tasks from the hub, those of `local_tasks` also from local files.

The only module that imports lm-eval.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.core.errors import UPQError
from upq.core.progress import Progress, Silent
from upq.decoding import Unsuitable, batch
from upq.evals import code, mini
from upq.evals.choices import score
from upq.evals.items import Item, items_of
from upq.evals.kept import KeptAnswers
from upq.evals.local_tasks import local_names, write_local_tasks
from upq.model.loading import embedding_rows
from upq.text.date import fixed_date
from upq.text.generation import Over, Request, end_tokens, generating, own_distribution

if TYPE_CHECKING:
    from lm_eval.api.model import LM

_IFEVAL_PACKAGES = ("nltk", "langdetect", "immutabledict")
_SIDE_BY_SIDE = 32  # answers that are written at a time, at least
_GREEDY = {"until", "max_gen_toks", "do_sample", "temperature"}  # settings of a task
_NOISY = ("lm_eval", "transformers", "datasets", "huggingface_hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    limit: int | None
    seed: int
    num_fewshot: int | None
    chat: bool | None


def evaluate_tasks(
    model: PreTrainedModel | LM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 1234,
    num_fewshot: int | None = None,
    chat: bool | None = None,
    thinking: bool = False,
    answers: Path | None = None,
    of: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    items: list[Item] | None = None,
    samples: code.Samples = code.ONE,
) -> dict[str, dict[str, float]]:
    """Scores by task name: for a group also its inner groups (`mmlu`, then `mmlu_stem` and so on), never its leaves.

    Metrics bear lm-eval's names (`acc`, `acc_stderr`); `samples` is how many questions were asked. Tasks that generate
    also have `at_length_limit`, the share of answers cut off by the task's limit on new tokens.

    mini_mmlu and mini_ifeval (upq.evals.mini) need no files and no hub.
    `data_dir`: tasks of upq.evals.local_tasks come from there (it has the layout), everything else from the hub.
    `limit`: questions of each task, which for a group means of each leaf, so 57 times as many for mmlu.
    `num_fewshot`: None is the task's own number (mmlu: 0, ifeval: 0, which is fixed); examples come from dev.
    `chat`: None puts prompts of tasks that generate into the tokenizer's chat template, if it has one, and leaves those
    that compare likelihoods as plain text; True and False hold for all tasks.
    `answers`: a file that keeps each answer as it comes; with the same one, a run that was stopped goes on. `of` says
    what else answers depend on, such as the model's digest; a file of something else is refused.
    `thinking`: for chat templates with such a switch; off, because the limit on new tokens is meant for the answer.
    `items`: gets every scored item, in order; needs `answers`.
    A `model` that is an lm-eval LM already is used as it is.

    Tasks of upq.evals.code run what the model writes, `samples` of them for each problem, and never go through lm-eval.
    """
    programs = {name: code.read_problems(name, data_dir, limit) for name in tasks if name in code.FILES}
    others, results = [name for name in tasks if name not in code.FILES], dict[str, dict[str, float]]()
    if programs and not isinstance(model, PreTrainedModel):
        raise UPQError(f"task {min(programs)} needs a model of transformers")
    _require_packages(others)
    shown = progress
    progress = progress or Silent()
    options = _Options(limit=limit, seed=seed, num_fewshot=num_fewshot, chat=chat)
    with ExitStack() as stack:
        stack.enter_context(fixed_date())
        kept = None
        if answers is not None:
            kept = stack.enter_context(KeptAnswers(answers, {**(of or {}), "thinking": thinking}))
            if len(kept):
                progress.note(f"{answers}: {len(kept)} answers are there already")
        if chat and tokenizer.chat_template is None:
            raise UPQError("the tokenizer has no chat template for chat prompts; use chat=False")
        if others:
            stack.enter_context(_quiet())
            stack.enter_context(_seeded(seed))
            loaded = _load(others, data_dir, progress, stack)
            harness = _as_lm(model, tokenizer, batch_size, thinking, shown)
            if kept is not None:
                harness.upq_kept = harness.cache_hook = kept
            for name, parts in loaded.items():  # all of them first: a task may take hours
                _check_room(harness, name, parts["tasks"])
            for name, parts in loaded.items():
                results |= _run(harness, tokenizer, name, parts, options, progress, items)
        for name, problems in programs.items():
            assert isinstance(model, PreTrainedModel)
            results[name] = code.evaluate_code(
                model,
                tokenizer,
                name,
                problems,
                samples,
                seed=seed,
                batch_size=batch_size,
                chat=chat,
                thinking=thinking,
                kept=kept,
                progress=progress,
                items=items,
            )
    return results


def _run(
    harness: Any,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    parts: dict[str, Any],
    options: _Options,
    progress: Progress,
    items: list[Item] | None,
) -> dict[str, dict[str, float]]:
    from lm_eval import evaluate

    leaves = parts["tasks"].values()
    for task in leaves:
        # as lm-eval's own simple_evaluate: a task that fixes 0 keeps it
        own = task.get_config("num_fewshot")
        if own is None or (options.num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=options.num_fewshot or 0)
        task.set_fewshot_seed(seed=options.seed)
    generates = all(task.OUTPUT_TYPE == "generate_until" for task in leaves)
    chat = generates and tokenizer.chat_template is not None if options.chat is None else options.chat
    counts = _Counts.reset(harness)
    harness.upq_task = name
    raw = evaluate(
        harness,
        parts,
        limit=options.limit,
        log_samples=items is not None,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,  # lm-eval's own choice: examples are turns of the conversation, not one long turn
    )
    if items is not None:
        items += items_of(name, raw["samples"], harness.upq_kept)
    shown = [*parts["groups"]] if name in parts["groups"] else [*parts["tasks"]]
    scores = {shown_name: _plain(raw["results"][shown_name]) for shown_name in sorted(shown, key=lambda n: n != name)}
    if counts is not None:
        if counts.cut:
            progress.note(f"{name}: {counts.cut} prompts are longer than the model's context and lost their beginning")
        if counts.answers and name in scores:
            scores[name]["at_length_limit"] = counts.at_limit / counts.answers
    return scores


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """`acc,none` becomes `acc`; a filter other than none stays in the name. What is not a number is left out."""
    named = {key.removesuffix(",none"): value for key, value in metrics.items() if "," in key}
    plain = {key: float(value) for key, value in named.items() if isinstance(value, int | float)}
    return plain | {"samples": float(metrics["sample_len"])} if "sample_len" in metrics else plain


def _load(
    tasks: Sequence[str], data_dir: Path | None, progress: Progress, stack: ExitStack
) -> dict[str, dict[str, Any]]:
    """lm-eval's task objects by requested name. Their data sets are in memory afterwards."""
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(tasks))
    local = [name for name in names if name in local_names()] if data_dir is not None else []
    packaged = [name for name in names if name in mini.names()]
    include = [str(mini.FOLDER)] if packaged else []
    if data_dir is not None and local:
        if "ifeval" in local:
            stack.enter_context(_nltk_data(data_dir))
        out = stack.enter_context(tempfile.TemporaryDirectory(prefix="upq-tasks-"))
        for note in write_local_tasks(local, data_dir, Path(out)):
            progress.note(note)
        include.append(out)
    # lm-eval's own folder holds thousands of files: it is read only when a task of the hub is asked for
    manager = TaskManager(include_path=include, include_defaults=len(local) + len(packaged) < len(names))
    loaded = {}
    for name in names:
        if name not in manager.all_tasks:
            remedy = f"no file for it in {data_dir}" if name in local else "see `lm-eval ls tasks` for the names"
            raise UPQError(f"unknown task {name!r}: {remedy}")
        loaded[name] = _load_one(manager, name)
    if "ifeval" in names:
        _require_punkt()
    return loaded


def _load_one(manager: Any, name: str) -> dict[str, Any]:
    try:
        parts: dict[str, Any] = manager.load([name])
    except ImportError as error:
        raise UPQError(f"task {name} needs a package that is missing ({error}): pip install 'upq[eval]'") from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UPQError(
            f"task {name}: its data cannot be loaded from the hub ({reason}); "
            "offline, give local files (docs/tasks.md has the layout) by --data-dir"
        ) from error
    return parts


def _as_lm(
    model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, thinking: bool, progress: Progress | None
) -> Any:
    if not isinstance(model, PreTrainedModel):
        return model
    own = copy.deepcopy(tokenizer)
    if own.pad_token_id is None and own.eos_token_id is None:  # lm-eval would add one, beyond the embedding
        ids = own.all_special_ids or [embedding_rows(model.config) - 1]
        own.pad_token = own.convert_ids_to_tokens(ids[0])
    return _harness_class(progress)(
        pretrained=model,
        tokenizer=own,  # lm-eval gives it the end token for padding where it has none
        batch_size=batch_size,
        chat_template_args={"enable_thinking": thinking},
    )


class _Counts:
    """Report as notes what lm-eval writes to its log only."""

    def __init__(self) -> None:
        self.cut = 0  # prompts that did not fit the context
        self.answers = 0
        self.at_limit = 0

    @staticmethod
    def reset(harness: Any) -> _Counts | None:
        if not hasattr(harness, "upq_counts"):
            return None
        harness.upq_counts = _Counts()
        counts: _Counts = harness.upq_counts
        return counts


def _harness_class(progress: Progress | None) -> type[Any]:
    from lm_eval.models.huggingface import HFLM

    shown, quiet = progress or Silent(), progress is not None or not sys.stderr.isatty()

    class Harness(HFLM):  # type: ignore[misc]
        """lm-eval's transformers backend, counting cut prompts and unfinished answers.

        `progress` advances by questions and answers; without it lm-eval shows its own bars, on a terminal.
        """

        upq_counts = _Counts()
        upq_task = ""
        upq_kept: KeptAnswers | None = None
        _left = 0  # requests in progress

        @contextmanager
        def _counted(self, requests: Any) -> Iterator[None]:
            """Within, `progress` goes through `requests`. Some have their result from another's logits."""
            shown.plan({self.upq_task: (len(requests), 1.0)})
            shown.start(self.upq_task)
            self._left = len(requests)
            yield
            self._done(self._left)

        def _done(self, count: int) -> None:
            count = min(count, self._left)
            if count:
                self._left -= count
                shown.advance(count)

        def _unless_kept(self, kind: str, requests: list[Any], compute: Any) -> list[Any]:
            """Answers in order; `compute` gets the requests whose answer is not in the file."""
            file = self.upq_kept
            kept = [None if file is None else file.get(kind, request.args) for request in requests]
            todo = [request for request, found in zip(requests, kept, strict=True) if found is None]
            answers: Iterator[Any] = iter(())
            if todo:
                with self._counted(todo):
                    answers = iter(compute(todo, disable_tqdm=quiet))
            if kind == "generate_until":
                self.upq_counts.answers += sum(found is not None for found in kept)
                self.upq_counts.at_limit += sum(found["at_limit"] for found in kept if found is not None)
            return [next(answers) if found is None else found["answer"] for found in kept]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._unless_kept("loglikelihood", requests, super().loglikelihood)

        def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *args, **options)
            self._done(len(inps))
            return logits

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            # as many tokens as the context are read: the last one of the continuation is only predicted
            longest = self.max_length + 1
            cut = {tuple(context) for _, context, answer in requests if len(context) + len(answer) > longest}
            self.upq_counts.cut += len(cut)  # a prompt has a request for each of its choices
            answers = self._branched(requests)
            rest = [request for number, request in enumerate(requests) if number not in answers]
            others = iter(super()._loglikelihood_tokens(rest, disable_tqdm=disable_tqdm, **options) if rest else [])
            return [answers[number] if number in answers else next(others) for number in range(len(requests))]

        def _branched(self, requests: Any) -> dict[int, tuple[float, bool]]:
            """By number, answers to requests that share their context with another and fit the model whole."""
            groups: dict[tuple[int, ...], list[int]] = {}
            for number, (_, context, _) in enumerate(requests):
                groups.setdefault(tuple(context), []).append(number)
            shared = [
                (context, numbers)
                for context, numbers in groups.items()
                if len(numbers) > 1 and len(context) + max(len(requests[n][2]) for n in numbers) <= self.max_length + 1
            ]
            by_length: dict[int, list[tuple[tuple[int, ...], list[int]]]] = {}
            for context, numbers in sorted(shared, key=lambda group: -len(group[0])):  # the largest first, as lm-eval
                by_length.setdefault(len(context), []).append((context, numbers))
            found: dict[int, tuple[float, bool]] = {}
            for group in by_length.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    contexts_BT = torch.tensor([context for context, _ in batch])
                    scores = score(self.model, contexts_BT, [[requests[n][2] for n in ns] for _, ns in batch])
                    if scores is None:
                        return found
                    pairs = zip((n for _, ns in batch for n in ns), (s for each in scores for s in each), strict=True)
                    for number, answer in pairs:
                        found[number] = answer
                        if requests[number][0] is not None:  # a window of a longer text
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                    self._done(sum(len(numbers) for _, numbers in batch))
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            compiled = _side_by_side(self, requests)
            return self._unless_kept("generate_until", requests, compiled or super().generate_until)

        def upq_answered(self, context: str, settings: Any, answer: list[int], limit: int, stop: list[str]) -> str:
            """The text of an answer as lm-eval cuts it, counted and kept."""
            from lm_eval.models.utils import postprocess_generated_text

            text = str(postprocess_generated_text(self.tok_decode(answer), stop, None))
            self._count(answer, limit, stop)
            self.cache_hook.add_partial("generate_until", (context, settings), text)
            self._done(1)
            return text

        def _count(self, answer: list[int], limit: int, stop: list[str]) -> None:
            ends = end_tokens(self.model.generation_config, self.tokenizer)
            text = self.tok_decode(answer)
            finished = not set(ends).isdisjoint(answer) or any(text.find(s) >= 0 for s in stop if s)
            at_limit = not finished and len(answer) == limit
            self.upq_counts.answers += 1
            self.upq_counts.at_limit += at_limit
            if self.upq_kept is not None:
                self.upq_kept.at_limit.append(at_limit)

        def tok_batch_encode(
            self,
            strings: Any,
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> Any:
            tokens, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
            if left_truncate_len is None:
                return tokens, mask
            self.upq_counts.cut += int((mask.sum(1) > left_truncate_len).sum())
            return tokens[:, -left_truncate_len:], mask[:, -left_truncate_len:]

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            ends = end_tokens(self.model.generation_config, self.tokenizer)
            with generating(self.model, own_distribution(ends, self.tokenizer)):  # the rest is the task's to set
                tokens = super()._model_generate(context, max_length=max_length, stop=stop, **options)
            for answer in tokens[:, context.shape[1] :].tolist():
                self._count(answer, max_length - context.shape[1], stop)
            self._done(len(context))
            return tokens

    return Harness


def _side_by_side(harness: Any, requests: Sequence[Any]) -> Callable[..., list[str]] | None:
    """lm-eval's `generate_until` through the compiled decoder, or None where it does not take model or requests.

    An answer that ends leaves its place to the next question. Only greedy answers: others are drawn as lm-eval draws.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    settings = [normalize_gen_kwargs(request.args[1], harness.max_gen_toks) for request in requests]
    if any(each.keys() - _GREEDY or each["do_sample"] for each in settings):
        return None
    try:
        texts = batch(harness.model, size=max(harness.batch_size, _SIDE_BY_SIDE))
    except Unsuitable:
        return None
    ends = frozenset(end_tokens(harness.model.generation_config, harness.tokenizer))
    eos = harness.tok_decode(harness.eot_token_id, skip_special_tokens=False)

    def generate_until(requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [normalize_gen_kwargs(request.args[1], harness.max_gen_toks) for request in requests]
        stops = [handle_stop_sequences(each["until"], eos=eos) for each in asked]

        def prompts() -> Iterator[Request[int]]:
            for number, (request, each, stop) in enumerate(zip(requests, asked, stops, strict=True)):
                limit = each["max_gen_toks"]
                ids, _ = harness.tok_batch_encode([request.args[0]], left_truncate_len=harness.max_length - limit)
                over = Over(harness.tokenizer, ends, tuple(filter(None, stop)))
                yield Request(number, tuple(ids[0].tolist()), limit, over)

        answers = dict[int, str]()
        for number, written in texts.write(prompts()):
            context, own = requests[number].args
            answers[number] = harness.upq_answered(context, own, written, asked[number]["max_gen_toks"], stops[number])
        return [answers[number] for number in range(len(requests))]

    return generate_until


def _check_room(harness: Any, name: str, tasks: dict[str, Any]) -> None:
    """lm-eval asserts this only after the prompts are built."""
    context = getattr(harness, "max_length", None)
    for task in tasks.values():
        limit = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", 0)
        if context is not None and task.OUTPUT_TYPE == "generate_until" and limit >= context:
            raise UPQError(f"task {name} generates {limit} tokens, but the model's context is {context}; leave it out")


def _require_packages(tasks: Sequence[str]) -> None:
    if not tasks:
        return
    needed = ["lm_eval", *(_IFEVAL_PACKAGES if any("ifeval" in task for task in tasks) else ())]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise UPQError(f"tasks {', '.join(tasks)} need {', '.join(missing)}: pip install 'upq[eval]'")


@contextmanager
def _nltk_data(data_dir: Path) -> Iterator[None]:
    """NLTK looks here first. Before lm-eval's checkers are imported, or they would download what they miss."""
    import nltk

    folder = str((data_dir / "nltk_data").resolve())
    nltk.data.path.insert(0, folder)
    try:
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            raise UPQError(f"{folder}: tokenizers/punkt_tab is missing, which ifeval needs; get it from NLTK") from None
        yield
    finally:
        nltk.data.path.remove(folder)


def _require_punkt() -> None:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise UPQError(
            "task ifeval needs NLTK's punkt_tab, which could not be downloaded: put it in nltk_data of --data-dir"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs its whole configuration; LMEVAL_LOG_LEVEL, its own variable, brings that back."""
    if os.environ.get("LMEVAL_LOG_LEVEL"):
        yield
        return
    import lm_eval.api.task as task_module

    levels = {name: logging.getLogger(name).level for name in _NOISY}
    bar = task_module.tqdm
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # one bar for each of 57 subjects while prompts are put together, which takes a moment
    task_module.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        task_module.tqdm = bar
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and torch's generators for the run only: few-shot samplers and IFEval's checkers draw from them."""
    state = random.getstate()
    with torch.random.fork_rng():
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)

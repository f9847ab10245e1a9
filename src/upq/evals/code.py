"""Tasks whose answers are programs: written by the model, run with their tests, scored by pass@k.

    DATA_DIR/generation/human_eval.jsonl   humaneval: prompt, test (defines check), entry_point
    DATA_DIR/code.jsonl                    code: problems of one's own, in the same form

A base model goes on from the prompt. One with a chat template is asked for the solution, and its answer is begun with
the prompt, as lm-eval's humaneval_instruct does. Nothing here needs lm-eval.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.core.errors import UPQError
from upq.core.progress import Progress
from upq.core.scramble import scramble
from upq.data.conversations import refusals
from upq.data.generated import continued
from upq.decoding import Unsuitable, batch
from upq.evals import sandbox
from upq.evals.items import Item, loops
from upq.evals.kept import KeptAnswers
from upq.evals.local_tasks import read_rows, require
from upq.model.loading import context_of
from upq.text.generation import Over, Request, Sampling, end_tokens

FILES = {"humaneval": "generation/human_eval.jsonl", "code": "code.jsonl"}
LIMIT = 1024  # tokens of an answer
_KEYS = ("prompt", "test", "entry_point")
_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")  # lm-eval's, and the end of a block of code
_ASKED = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```\n"
_BEGUN = "Here is the completed function:\n```python\n{}"
_SHOWN = (1, 10, 100)  # k
_SIDE_BY_SIDE = 32  # answers that are written at a time, at least


@dataclass(frozen=True, slots=True)
class Problem:
    number: int  # in its file
    prompt: str
    test: str
    entry_point: str

    def program(self, answer: str) -> str:
        return f"{self.prompt}{answer}\n{self.test}\ncheck({self.entry_point})\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """How often each problem is answered, and at which temperature."""

    count: int = 1
    temperature: float = 0.0

    @classmethod
    def of(cls, count: int, temperature: float | None) -> Samples:
        """Without a temperature 0, the likeliest tokens, for one answer and 0.2 for several. Raises UPQError."""
        if count > 1 and temperature == 0:
            raise UPQError(f"--samples {count}: at temperature 0 all answers are the same; raise --temperature")
        return cls(count=count, temperature=(0.0 if count == 1 else 0.2) if temperature is None else temperature)


ONE = Samples()


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    ending: str
    at_limit: bool


def read_problems(task: str, data_dir: Path | None, limit: int | None) -> list[Problem]:
    """Raises UPQError for what is no problem."""
    if data_dir is None:
        raise UPQError(f"task {task} reads {FILES[task]} of --data-dir; name the directory")
    path, found = data_dir / FILES[task], list[Problem]()
    require(path, task)
    for number, row in read_rows(path, task, _KEYS):
        if wrong := [key for key in _KEYS if not isinstance(row[key], str)]:
            raise UPQError(f"{path}:{number}: {', '.join(wrong)} must be a text; mend the row")
        found.append(Problem(len(found), row["prompt"], row["test"], row["entry_point"]))
    return found[:limit]


def pass_at_k(answers: int, passed: int, k: int) -> float:
    """The chance that one of k answers passes: 1 − C(n − c, k) / C(n, k), without bias (Chen et al., arXiv 2107.03374).

    Law (tests/test_evals_code.py): the mean over all choices of k of the n answers.
    """
    assert 1 <= k <= answers
    return 1.0 - math.comb(answers - passed, k) / math.comb(answers, k)


def evaluate_code(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    problems: Sequence[Problem],
    samples: Samples,
    *,
    seed: int,
    batch_size: int,
    chat: bool | None = None,
    thinking: bool = False,
    kept: KeptAnswers | None = None,
    progress: Progress,
    items: list[Item] | None = None,
) -> dict[str, float]:
    """pass@k for every k of 1, 10 and 100 that has as many answers, and `samples`, the number of problems.

    Each answer is run as it comes, and kept. `items`: gets every problem, under pass@1 and, of several answers, whether
    more than half of them passed.
    """
    if not sandbox.check().apart:
        progress.note(f"{task}: no namespaces here; programs are kept off the network and files by their interpreter")
    wanted = {
        (problem.number, i): _arguments(task, problem, i, samples, seed, chat, thinking)
        for problem in problems
        for i in range(samples.count)
    }
    found = dict[tuple[int, int], _Answer]()
    for place, arguments in wanted.items():
        if kept is not None and (stored := kept.get("program", arguments)) is not None:
            found[place] = _Answer(**stored["answer"])
    progress.plan({task: (len(wanted), 1.0)})
    progress.start(task, done=len(found))
    by_number = {problem.number: problem for problem in problems}
    todo = [place for place in wanted if place not in found]
    requests = _requests(model, tokenizer, by_number, todo, samples, seed, chat, thinking, task)
    for place, ids in _written(model, tokenizer, requests, batch_size, progress):
        over, limit = requests[place].over, requests[place].limit
        text = _cut(str(tokenizer.decode(ids, skip_special_tokens=True)))
        ending = sandbox.run(by_number[place[0]].program(text)).ending
        found[place] = _Answer(text, ending, len(ids) >= limit and not over(ids))
        if kept is not None:
            answer = found[place]
            stored = {"text": answer.text, "ending": answer.ending, "at_limit": answer.at_limit}
            kept.add_partial("program", wanted[place], stored)
        progress.advance(1)
    return _scores(task, problems, samples, found, progress, items)


def _arguments(
    task: str, problem: Problem, i: int, samples: Samples, seed: int, chat: bool | None, thinking: bool
) -> list[Any]:
    """All that an answer and its result depend on, beside the model."""
    drawn = [i, seed, samples.temperature] if samples.temperature else []
    limits = sandbox.Limits()
    how = [LIMIT, chat, thinking, limits.seconds, limits.memory, limits.file]
    return [task, problem.prompt, problem.test, problem.entry_point, *drawn, *how]


def _requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: dict[int, Problem],
    places: Sequence[tuple[int, int]],
    samples: Samples,
    seed: int,
    chat: bool | None,
    thinking: bool,
    task: str,
) -> dict[tuple[int, int], Request[tuple[int, int]]]:
    over = Over(tokenizer, frozenset(end_tokens(model.generation_config, tokenizer)), _STOPS)
    context, found, prompts = context_of(model.config), dict[tuple[int, int], Request[tuple[int, int]]](), {}
    for number, i in places:
        if number not in prompts:
            prompts[number] = _prompt(problems[number], tokenizer, chat, thinking, task)
        ids = prompts[number]
        room = LIMIT if context is None else min(LIMIT, context - len(ids))
        if room < 1:
            raise UPQError(f"{task}: problem {number} takes {len(ids)} tokens, the model's context is {context}")
        drawn = int(scramble(np.array([number << 20 | i], np.uint64), seed)[0])
        found[number, i] = Request((number, i), ids, room, over, Sampling(samples.temperature, drawn))
    return found


def _prompt(
    problem: Problem, tokenizer: PreTrainedTokenizerBase, chat: bool | None, thinking: bool, task: str
) -> tuple[int, ...]:
    if tokenizer.chat_template is None or chat is False:
        return tuple(tokenizer(problem.prompt)["input_ids"])
    with refusals(task):
        asked: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": _ASKED.format(problem.prompt)}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
    return tuple(tokenizer(asked + _BEGUN.format(problem.prompt), add_special_tokens=False)["input_ids"])


def _written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: dict[tuple[int, int], Request[tuple[int, int]]],
    batch_size: int,
    progress: Progress,
) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Answers as they end: by the compiled decoder where it takes the model, else by transformers, in order."""
    if not requests:
        return
    try:
        texts = batch(model, size=max(batch_size, _SIDE_BY_SIDE))
    except Unsuitable as reason:
        progress.note(f"transformers writes, not the compiled decoder: {reason}")
        ends, waiting = end_tokens(model.generation_config, tokenizer), list(requests.values())
        for first in range(0, len(waiting), batch_size):
            some = waiting[first : first + batch_size]
            prompts, samplings = [list(request.ids) for request in some], [request.sampling for request in some]
            limit = min(request.limit for request in some)
            for request, ids in zip(some, continued(model, tokenizer, prompts, samplings, limit, ends), strict=True):
                end = next((n for n in range(1, len(ids)) if request.over(ids[:n])), len(ids))
                yield request.key, ids[:end]
        return
    yield from texts.write(requests.values())


def _cut(text: str) -> str:
    """Up to the first thing that is no longer the function."""
    return text[: min((at for stop in _STOPS if (at := text.find(stop)) >= 0), default=len(text))]


def _scores(
    task: str,
    problems: Sequence[Problem],
    samples: Samples,
    found: dict[tuple[int, int], _Answer],
    progress: Progress,
    items: list[Item] | None,
) -> dict[str, float]:
    answers = defaultdict[int, list[_Answer]](list)
    for number, i in sorted(found):
        answers[number].append(found[number, i])
    counts = [sum(answer.ending == "passed" for answer in answers[problem.number]) for problem in problems]
    scores = dict[str, float]()
    for k in (k for k in _SHOWN if k <= samples.count):
        each_N = np.array([pass_at_k(samples.count, passed, k) for passed in counts])
        scores[f"pass@{k}"] = float(each_N.mean())
        if len(each_N) > 1:
            scores[f"pass@{k}_stderr"] = float(each_N.std(ddof=1) / math.sqrt(len(each_N)))
    endings = Counter(answer.ending for answer in found.values())
    progress.note(f"{task}: {', '.join(f'{count:,} {ending}' for ending, count in endings.most_common())}")
    for problem, passed in zip(problems, counts, strict=True) if items is not None else ():
        shown = answers[problem.number][0]
        measures = {"pass@1": passed / samples.count}
        if samples.count > 1:
            measures["more than half pass"] = float(2 * passed > samples.count)
        for measure, score in measures.items():
            assert items is not None
            items.append(
                Item(
                    asked=task,
                    task=task,
                    measure=measure,
                    id=problem.number,
                    question=problem.prompt,
                    answer=f"{shown.text}\n# {shown.ending}",
                    score=score,
                    at_limit=shown.at_limit,
                    loops=loops(shown.text),
                )
            )
    cut = sum(answer.at_limit for answer in found.values()) / len(found)
    return {**scores, "samples": float(len(problems)), "answers": float(len(found)), "at_length_limit": cut}

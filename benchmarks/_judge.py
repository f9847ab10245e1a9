"""How good a model of the ablation is: on text against the original, and on the two suites, answer by answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

import upq
from upq.evals import evaluate_tasks, evaluate_text, mini
from upq.model.loading import load_model, load_tokenizer
from upq.nn.blocks import model_weights
from upq.world import AREAS

REPEATS = 3  # of one n-gram, at the end of an answer
LOOP_TOKENS = 12  # that they cover at least: "no, no, no" is no loop
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Suites:
    """Which items of mini_mmlu and mini_ifeval are asked."""

    split: str = "test"  # or validation
    limit: int | None = None  # items of each task

    @property
    def areas(self) -> dict[str, str]:
        """Task of each subject of mini_mmlu."""
        middle = "" if self.split == "test" else f"_{self.split}"
        return {f"mini_mmlu{middle}_{area}": area for area in AREAS}

    @property
    def ifeval(self) -> str:
        return "mini_ifeval" if self.split == "test" else f"mini_ifeval_{self.split}"


def judge(
    model: Path, original: Path, heldout: Mapping[str, Tensor], suites: Suites | None, *, device: str
) -> dict[str, Any]:
    """Figures by name; `items` has 1 or 0 for each item of a suite, in order. All products are in float32.

    `heldout`: texts as rows (N, T) by name. The figures of the first bear plain names (`ppl`), those of others their
    text's (`ppl_wikitext2`).
    """
    judged = upq.load(model, dequantize=True, dtype=torch.float32, device=device)
    teacher = load_model(original, dtype=torch.float32, device=device)
    figures: dict[str, Any] = {"weight_error": weight_error(judged, teacher)}
    for number, (name, rows_NT) in enumerate(heldout.items()):
        text = evaluate_text(judged, rows_NT, teacher=teacher)
        which = f"_{name}" if number else ""
        for key in ("ppl", "kld", "top1"):
            figures[f"{key}{which}"] = getattr(text, key)
        figures[f"original_ppl{which}"] = text.teacher_ppl
        for key in ("kld", "top1"):
            figures[f"{key}{which}_stderr"] = getattr(text, f"{key}_stderr")
    del teacher
    if suites is not None:
        recorder = Recorder(pretrained=judged, tokenizer=load_tokenizer(original), batch_size=_BATCH)
        figures |= knowledge(recorder, suites) | obedience(recorder, suites)
        figures["items"] = {"mini_mmlu": figures.pop("known"), "mini_ifeval": figures.pop("obeyed")}
    return figures


@torch.no_grad()
def weight_error(model: PreTrainedModel, original: PreTrainedModel) -> float:
    """Relative error of the block linears' weights, all together."""
    pairs = [
        (model.get_submodule(path).weight, original.get_submodule(path).weight) for path in model_weights(original)
    ]
    wrong = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(wrong / sum(float(b.square().sum()) for _, b in pairs))


# ---- the suites


def knowledge(recorder: Recorder, suites: Suites) -> dict[str, Any]:
    """Accuracy, also by subject; the standard error is that of a stratified mean, the subjects being the strata."""
    scores = evaluate_tasks(recorder, recorder.tokenizer, list(suites.areas), limit=suites.limit)
    sizes = {task: score["samples"] for task, score in scores.items()}
    shares = {task: size / sum(sizes.values()) for task, size in sizes.items()}
    figures = {f"mini_mmlu_{suites.areas[task]}": score["acc"] for task, score in scores.items()}
    known = "".join(recorder.chosen[task] for task in suites.areas)
    mean = sum(share * scores[task]["acc"] for task, share in shares.items())
    assert math.isclose(mean, known.count("1") / len(known)), "not what was scored"
    variance = sum((share * scores[task]["acc_stderr"]) ** 2 for task, share in shares.items())
    return {"mini_mmlu": mean, "mini_mmlu_stderr": math.sqrt(variance), **figures, "known": known}


def obedience(recorder: Recorder, suites: Suites) -> dict[str, Any]:
    """Strict scores by request and by instruction, and what becomes of the answers that do not end well."""
    score = evaluate_tasks(recorder, recorder.tokenizer, [suites.ifeval], limit=suites.limit)[suites.ifeval]
    followed = [mini.ifeval_results(doc, [answer])["inst_level_strict_acc"] for doc, answer in recorder.answers]
    obeyed = "".join(str(int(all(each))) for each in followed)
    assert math.isclose(score["prompt_level_strict_acc"], obeyed.count("1") / len(obeyed)), "not what was scored"
    return {
        "mini_ifeval": score["prompt_level_strict_acc"],
        "mini_ifeval_stderr": score["prompt_level_strict_acc_stderr"],
        "mini_ifeval_instructions": score["inst_level_strict_acc"],
        "mini_ifeval_instructions_stderr": stderr_of_ratio([sum(each) for each in followed], [*map(len, followed)]),
        "at_length_limit": sum(not ended for _, ended in recorder.written) / len(recorder.written),
        "loops": sum(loops(tokens) for tokens, _ in recorder.written) / len(recorder.written),
        "obeyed": obeyed,
    }


class Recorder(HFLM):  # type: ignore[misc]
    """lm-eval's transformers backend, which keeps what was answered."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.chosen: dict[str, str] = {}  # by task, for each question: was the right choice the likeliest?
        self.answers: list[tuple[dict[str, Any], str]] = []  # request (its document) and answer
        self.written: list[tuple[list[int], bool]] = []  # tokens of an answer before its end, and whether it has one

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        found = super().loglikelihood(requests, disable_tqdm=True)
        choices: dict[tuple[str, int], list[tuple[float, bool]]] = {}
        for request, (likelihood, _) in zip(requests, found, strict=True):
            right = request.idx == request.doc["answer"]
            choices.setdefault((request.task_name, request.doc_id), []).append((likelihood, right))
        for (task, _), options in sorted(choices.items()):
            best = max(options, key=lambda option: option[0])  # the first of equals, as in lm-eval
            self.chosen[task] = self.chosen.get(task, "") + str(int(best[1]))
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        found = super().generate_until(requests, disable_tqdm=True)
        pairs = sorted(zip(requests, found, strict=True), key=lambda pair: pair[0].doc_id)
        self.answers += [(request.doc, answer) for request, answer in pairs]
        return found

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        tokens = super()._model_generate(context, max_length=max_length, stop=stop, **options)
        end = self.tokenizer.eos_token_id
        for answer in tokens[:, context.shape[1] :].tolist():
            ended = end in answer
            self.written.append((answer[: answer.index(end)] if ended else answer, ended))
        return tokens


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last tokens are REPEATS repetitions of one n-gram, over LOOP_TOKENS tokens or more.

    An answer that the limit cut in the middle of a repetition counts: a turned n-gram repeats itself just as well.
    """
    for size in range(1, len(tokens) // REPEATS + 1):
        tail = tokens[-max(size * REPEATS, LOOP_TOKENS) :]
        if len(tail) >= LOOP_TOKENS and all(a == b for a, b in zip(tail, tail[size:], strict=False)):
            return True
    return False


def stderr_of_ratio(parts: Sequence[int], wholes: Sequence[int]) -> float:
    """Standard error of Σ parts / Σ wholes over items, linearised: the instructions of one request go together."""
    if len(parts) < 2:
        return math.nan
    ratio, n = sum(parts) / sum(wholes), len(parts)
    squares = sum((part - ratio * whole) ** 2 for part, whole in zip(parts, wholes, strict=True))
    return math.sqrt(squares * n / (n - 1)) / sum(wholes)

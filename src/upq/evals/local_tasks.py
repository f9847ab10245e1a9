"""lm-eval's own tasks over local files: its prompts, metrics and groups, with questions from elsewhere.

    DATA_DIR/mmlu/{dev,test}/<subject>_{dev,test}.csv   header question,choice0,choice1,choice2,choice3,answer (0 to 3)
    DATA_DIR/ifeval.jsonl                               key, prompt, instruction_id_list, kwargs
    DATA_DIR/nltk_data/tokenizers/punkt_tab             sentence splitter of IFEval's checkers
    DATA_DIR/choices/{arc_easy,arc_challenge,piqa,openbook_qa}.jsonl   query, choices, gold (an index)
    DATA_DIR/choices/winogrande.jsonl                   context_options, continuation, gold
    DATA_DIR/choices/hellaswag.jsonl                    activity_label, ctx_a, ctx_b, endings, label
    DATA_DIR/generation/lambada_openai.jsonl            context, continuation (its last word)
    DATA_DIR/generation/gsm8k.jsonl                     context, chain_of_thought, answer

Choices and generation are the files of MosaicML's llm-foundry, with HellaSwag's own rows. Examples (`num_fewshot`) are
other rows of the same file.

Each task becomes a small YAML file that includes the installed lm-eval's definition and names a function of this module
as its data set, so prompts and metrics follow the installed version.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict

from upq.core.bounded import read_bytes
from upq.core.errors import UPQError

_MMLU_COLUMNS = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
_IFEVAL_KEYS = ("key", "prompt", "instruction_id_list", "kwargs")


@dataclass(frozen=True, slots=True)
class _Mmlu:
    """lm-eval's definitions: files of the subjects, and of the groups with what each contains (a group or a tag)."""

    subjects: dict[str, Path]  # by the subject's name in the data set
    tags: dict[str, str]  # subject to tag
    tasks: dict[str, str]  # subject to task
    groups: dict[str, tuple[Path, list[str]]]


@dataclass(frozen=True, slots=True)
class _Rows:
    """A task of one file: lm-eval's definition, what a row of the file holds, and the same in lm-eval's columns."""

    file: str
    definition: str
    keys: tuple[str, ...]
    convert: Callable[[dict[str, Any]], dict[str, Any]]


def _choose(row: dict[str, Any], choices: str = "choices", gold: str = "gold") -> tuple[list[str], int]:
    """Options and the number of the right one. Raises ValueError, whose text ends the line of the error."""
    options, right = row[choices], row[gold]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
        raise ValueError(f"{choices} must be a list of at least two texts")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(options):
        raise ValueError(f"{gold} must be an index from 0 to {len(options) - 1}")
    return options, right


def _lettered(row: dict[str, Any], question: str) -> dict[str, Any]:
    """Columns of ARC and OpenBookQA; the file has ARC's question with the word that lm-eval's prompt begins with."""
    options, right = _choose(row)
    labels = [str(number) for number in range(len(options))]
    asked = _text(row, "query").removeprefix("Question: ").strip()
    return {question: asked, "choices": {"text": options, "label": labels}, "answerKey": labels[right]}


def _piqa(row: dict[str, Any]) -> dict[str, Any]:
    options, right = _choose(row)
    goal = _text(row, "query").removeprefix("Question: ").strip()
    return {"goal": goal, "sol1": options[0], "sol2": options[1], "label": right}


def _winogrande(row: dict[str, Any]) -> dict[str, Any]:
    """lm-eval puts an option where the sentence has its gap; here an option is all that stands before the rest."""
    options, right = _choose(row, "context_options")
    rest = f"_ {_text(row, 'continuation')}"
    return {"sentence": rest, "option1": options[0], "option2": options[1], "answer": str(right + 1)}


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    endings, right = _choose({**row, "label": int(row["label"])}, "endings", "label")
    return {key: _text(row, key) for key in ("activity_label", "ctx_a", "ctx_b")} | {
        "endings": endings,
        "label": str(right),
    }


def _lambada(row: dict[str, Any]) -> dict[str, Any]:
    word = _text(row, "continuation").strip()
    if not word or " " in word:
        raise ValueError("continuation must be one word")
    return {"text": f"{_text(row, 'context')} {word}"}


def _gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    answer = f"{_text(row, 'chain_of_thought')}\n#### {_text(row, 'answer')}"
    return {"question": _text(row, "context"), "answer": answer}


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} must be a text")
    return str(row[key])


_CHOICE = ("query", "choices", "gold")
_ROWS = {
    "arc_easy": _Rows("choices/arc_easy.jsonl", "arc/arc_easy.yaml", _CHOICE, lambda row: _lettered(row, "question")),
    "arc_challenge": _Rows(
        "choices/arc_challenge.jsonl", "arc/arc_challenge.yaml", _CHOICE, lambda row: _lettered(row, "question")
    ),
    "piqa": _Rows("choices/piqa.jsonl", "piqa/piqa.yaml", _CHOICE, _piqa),
    "openbookqa": _Rows(
        "choices/openbook_qa.jsonl", "openbookqa/openbookqa.yaml", _CHOICE, lambda row: _lettered(row, "question_stem")
    ),
    "winogrande": _Rows(
        "choices/winogrande.jsonl",
        "winogrande/default.yaml",
        ("context_options", "continuation", "gold"),
        _winogrande,
    ),
    "hellaswag": _Rows(
        "choices/hellaswag.jsonl",
        "hellaswag/hellaswag.yaml",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        _hellaswag,
    ),
    "lambada_openai": _Rows(
        "generation/lambada_openai.jsonl", "lambada/lambada_openai.yaml", ("context", "continuation"), _lambada
    ),
    "gsm8k": _Rows("generation/gsm8k.jsonl", "gsm8k/gsm8k.yaml", ("context", "chain_of_thought", "answer"), _gsm8k),
}


def local_names() -> set[str]:
    """Names of the tasks and groups that local files can serve."""
    mmlu = _installed_mmlu()
    return {"ifeval", *_ROWS, *mmlu.groups, *mmlu.tasks.values()}


def write_local_tasks(names: Sequence[str], data_dir: Path, out: Path) -> list[str]:
    """Write to `out` the YAML files that the local ones among `names` need; returns notes on what the data lacks."""
    notes = []
    if "ifeval" in names:
        path = data_dir / "ifeval.jsonl"
        require(path, "ifeval")
        definition = _lm_eval_tasks() / "ifeval" / "ifeval.yaml"
        _write_task(out / "ifeval.yaml", definition, "ifeval_docs", {"file": str(path)})
    for name in (name for name in names if name in _ROWS):
        file, definition = data_dir / _ROWS[name].file, _lm_eval_tasks() / _ROWS[name].definition
        require(file, name)
        # lm-eval would look for examples in a split that the files do not have
        splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
        _write_task(out / f"{name}.yaml", definition, "row_docs", {"task": name, "file": str(file)}, **splits)
    mmlu = _installed_mmlu()
    if set(names) & {*mmlu.groups, *mmlu.tasks.values()}:
        notes += _write_mmlu(mmlu, data_dir, out)
    return notes


def mmlu_docs(*, test: str, dev: str, **_metadata: Any) -> DatasetDict:
    """The columns of lm-eval's own MMLU source: question, choices (a list of 4), answer (an index)."""
    return DatasetDict({"test": _read_mmlu(Path(test)), "dev": _read_mmlu(Path(dev))})


def row_docs(*, task: str, file: str, **_metadata: Any) -> DatasetDict:
    """The columns of lm-eval's own source of `task`."""
    kind, rows = _ROWS[task], list[dict[str, Any]]()
    for number, row in read_rows(Path(file), task, kind.keys):
        try:
            rows.append(kind.convert(row))
        except (TypeError, ValueError) as error:
            raise UPQError(f"{file}:{number}: {error}; mend the row") from None
    return DatasetDict({"test": Dataset.from_list(rows)})


def ifeval_docs(*, file: str, **_metadata: Any) -> DatasetDict:
    """lm-eval scores the split that the original calls `train`."""
    rows = []
    for number, row in read_rows(Path(file), "ifeval", _IFEVAL_KEYS):
        if not all(isinstance(row[key], list) for key in ("kwargs", "instruction_id_list")):
            raise UPQError(f"{file}:{number}: kwargs and instruction_id_list must be lists; mend the row")
        if not all(isinstance(kwargs, dict) for kwargs in row["kwargs"]):
            raise UPQError(f"{file}:{number}: each of kwargs must be an object; mend the row")
        if len(row["kwargs"]) != len(row["instruction_id_list"]):
            raise UPQError(f"{file}:{number}: as many kwargs as instruction_id_list entries are needed")
        rows.append({key: row[key] for key in _IFEVAL_KEYS})
    return DatasetDict({"train": Dataset.from_list(_with_all_arguments(rows))})


def read_rows(path: Path, task: str, keys: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of each line and its object, which has all `keys`. Raises UPQError."""
    found = False
    for number, line in enumerate(read_bytes(path, remedy=f"is it the file of {task}?").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UPQError(f"{path}:{number}: not a JSON object; expected one object a line") from None
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise UPQError(f"{path}:{number}: {', '.join(missing)} missing; rows of {task} hold {', '.join(keys)}")
        found = True
        yield number, row
    if not found:
        raise UPQError(f"{path}: no rows in this file; {task} needs one object a line")


def _with_all_arguments(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every kwargs gets the keys of all, None where it had none: columns are typed, and lm-eval drops None again."""
    keys = sorted({key for row in rows for kwargs in row["kwargs"] for key in kwargs}) or ["unused"]
    return [{**row, "kwargs": [{key: kwargs.get(key) for key in keys} for kwargs in row["kwargs"]]} for row in rows]


def _read_mmlu(path: Path) -> Dataset:
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if header != _MMLU_COLUMNS:
            raise UPQError(f"{path}: the first row must be {','.join(_MMLU_COLUMNS)} (got {','.join(header)[:80]!r})")
        rows = []
        for row in lines:
            if len(row) != len(_MMLU_COLUMNS) or row[-1] not in ("0", "1", "2", "3"):
                raise UPQError(f"{path}:{lines.line_num}: expected a question, four choices and an answer from 0 to 3")
            rows.append({"question": row[0], "choices": row[1:5], "answer": int(row[5])})
    if not rows:
        raise UPQError(f"{path}: no questions in this file")
    return Dataset.from_list(rows)


def _write_mmlu(mmlu: _Mmlu, data_dir: Path, out: Path) -> list[str]:
    require(data_dir / "mmlu" / "test", "mmlu")
    tests = {p.name.removesuffix("_test.csv"): p for p in sorted((data_dir / "mmlu" / "test").glob("*_test.csv"))}
    if not tests:
        raise UPQError(f"{data_dir / 'mmlu' / 'test'}: no files named <subject>_test.csv")
    for subject, test in tests.items():
        if subject not in mmlu.subjects:
            raise UPQError(f"{test}: MMLU has no subject {subject!r}; remove the file or correct its name")
        dev = data_dir / "mmlu" / "dev" / f"{subject}_dev.csv"
        require(dev, f"mmlu ({subject})")
        source = {"test": str(test), "dev": str(dev)}
        _write_task(out / f"{mmlu.tasks[subject]}.yaml", mmlu.subjects[subject], "mmlu_docs", source)
    present = {mmlu.tags[subject] for subject in tests}
    for name in _inner_groups_first(mmlu):
        path, members = mmlu.groups[name]
        members = [member for member in members if member in present]
        if members:
            present.add(name)
            text = f"include: {json.dumps(str(path))}\ntask: {json.dumps(members)}\n"
            (out / f"_{name}.yaml").write_text(text, encoding="utf-8")
    if len(tests) == len(mmlu.subjects):
        return []
    return [f"mmlu: {len(tests)} of {len(mmlu.subjects)} subjects are in {data_dir / 'mmlu'}; the means are over these"]


def _inner_groups_first(mmlu: _Mmlu) -> list[str]:
    return sorted(mmlu.groups, key=lambda name: any(member in mmlu.groups for member in mmlu.groups[name][1]))


def _write_task(path: Path, definition: Path, function: str, arguments: dict[str, str], **settings: str | None) -> None:
    # JSON values are YAML values
    lines = {"include": str(definition), "dataset_kwargs": arguments, **settings}
    path.write_text(
        f"custom_dataset: !function {__name__}.{function}\n"
        + "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()),
        encoding="utf-8",
    )


def _installed_mmlu() -> _Mmlu:
    mmlu = _Mmlu({}, {}, {}, {})
    for path in sorted((_lm_eval_tasks() / "mmlu" / "default").glob("*.yaml")):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "group" in raw:
            mmlu.groups[raw["group"]] = (path, raw["task"])
        else:
            subject = raw["dataset_name"]
            mmlu.subjects[subject], mmlu.tags[subject], mmlu.tasks[subject] = path, raw["tag"], raw["task"]
    return mmlu


def _lm_eval_tasks() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UPQError("tasks need the package lm-eval: pip install 'upq[eval]'")
    return Path(spec.submodule_search_locations[0]) / "tasks"


def require(path: Path, task: str) -> None:
    if not path.exists():
        raise UPQError(f"{path} is missing, which {task} needs; complete --data-dir, or leave it out to use the hub")

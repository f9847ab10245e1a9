"""lm-eval's own MMLU and IFEval over local files: its prompts, metrics and groups, with questions from elsewhere.

    DATA_DIR/mmlu/{dev,test}/<subject>_{dev,test}.csv   header question,choice0,choice1,choice2,choice3,answer (0 to 3)
    DATA_DIR/ifeval.jsonl                               key, prompt, instruction_id_list, kwargs
    DATA_DIR/nltk_data/tokenizers/punkt_tab             sentence splitter of IFEval's checkers

Each task becomes a small YAML file that includes the installed lm-eval's definition and names a function of this module
as its data set, so prompts and metrics follow the installed version.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Sequence
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


def local_names() -> set[str]:
    """Names of the tasks and groups that local files can serve."""
    mmlu = _installed_mmlu()
    return {"ifeval", *mmlu.groups, *mmlu.tasks.values()}


def write_local_tasks(names: Sequence[str], data_dir: Path, out: Path) -> list[str]:
    """Write to `out` the YAML files that the local ones among `names` need; returns notes on what the data lacks."""
    notes = []
    if "ifeval" in names:
        path = data_dir / "ifeval.jsonl"
        _require(path, "ifeval")
        definition = _lm_eval_tasks() / "ifeval" / "ifeval.yaml"
        _write_task(out / "ifeval.yaml", definition, "ifeval_docs", {"file": str(path)})
    mmlu = _installed_mmlu()
    if set(names) & {*mmlu.groups, *mmlu.tasks.values()}:
        notes += _write_mmlu(mmlu, data_dir, out)
    return notes


def mmlu_docs(*, test: str, dev: str, **_metadata: Any) -> DatasetDict:
    """The columns of lm-eval's own MMLU source: question, choices (a list of 4), answer (an index)."""
    return DatasetDict({"test": _read_mmlu(Path(test)), "dev": _read_mmlu(Path(dev))})


def ifeval_docs(*, file: str, **_metadata: Any) -> DatasetDict:
    """lm-eval scores the split that the original calls `train`."""
    rows = []
    for number, line in enumerate(read_bytes(Path(file), remedy="is it IFEval's file?").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UPQError(f"{file}:{number}: not a JSON object; expected one object a line") from None
        missing = [key for key in _IFEVAL_KEYS if not isinstance(row, dict) or key not in row]
        if missing:
            raise UPQError(f"{file}:{number}: {', '.join(missing)} missing; IFEval rows hold {', '.join(_IFEVAL_KEYS)}")
        if not all(isinstance(row[key], list) for key in ("kwargs", "instruction_id_list")):
            raise UPQError(f"{file}:{number}: kwargs and instruction_id_list must be lists; mend the row")
        if not all(isinstance(kwargs, dict) for kwargs in row["kwargs"]):
            raise UPQError(f"{file}:{number}: each of kwargs must be an object; mend the row")
        if len(row["kwargs"]) != len(row["instruction_id_list"]):
            raise UPQError(f"{file}:{number}: as many kwargs as instruction_id_list entries are needed")
        rows.append({key: row[key] for key in _IFEVAL_KEYS})
    if not rows:
        raise UPQError(f"{file}: no prompts in this file")
    return DatasetDict({"train": Dataset.from_list(_with_all_arguments(rows))})


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
    _require(data_dir / "mmlu" / "test", "mmlu")
    tests = {p.name.removesuffix("_test.csv"): p for p in sorted((data_dir / "mmlu" / "test").glob("*_test.csv"))}
    if not tests:
        raise UPQError(f"{data_dir / 'mmlu' / 'test'}: no files named <subject>_test.csv")
    for subject, test in tests.items():
        if subject not in mmlu.subjects:
            raise UPQError(f"{test}: MMLU has no subject {subject!r}; remove the file or correct its name")
        dev = data_dir / "mmlu" / "dev" / f"{subject}_dev.csv"
        _require(dev, f"mmlu ({subject})")
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


def _write_task(path: Path, definition: Path, function: str, arguments: dict[str, str]) -> None:
    # JSON strings are YAML strings
    path.write_text(
        f"include: {json.dumps(str(definition))}\n"
        f"custom_dataset: !function {__name__}.{function}\n"
        f"dataset_kwargs: {json.dumps(arguments)}\n",
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


def _require(path: Path, task: str) -> None:
    if not path.exists():
        raise UPQError(f"{path} is missing, which {task} needs; complete --data-dir, or leave it out to use the hub")

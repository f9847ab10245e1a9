"""What the ablation compares, as data: rows (a recipe and what differs from it), and the tables they make up."""

from __future__ import annotations

import re
from dataclasses import dataclass

from _rows import FROM_FP, NO_TRAINING, THROUGH_INT4

ORIGINAL = "fp"


@dataclass(frozen=True, slots=True)
class Row:
    """A packaged recipe, what differs from it, and the kinds of text it is quantised with (`_corpora.KINDS`)."""

    recipe: str
    overrides: tuple[str, ...] = ()
    data: tuple[str, ...] = ("documents",)


@dataclass(frozen=True, slots=True)
class Group:
    """A table: its labels and the rows that stand there. One row may stand in several tables and is run once."""

    title: str
    rows: dict[str, str]
    every_seed: bool = False


ROWS: dict[str, Row] = {
    "int4": Row("paper", (FROM_FP, NO_TRAINING, "int2.bits=4", "int2.method={paper.int4}")),
    "int2-nearest": Row("paper", (FROM_FP, NO_TRAINING, "int2.grid=affine")),
    "int2-nearest-seq": Row("paper", (FROM_FP, NO_TRAINING)),
    "int4-int2-nearest": Row("paper", (NO_TRAINING,)),
    "ce-from-fp": Row("paper", (FROM_FP, "distill.loss=ce")),
    "ce-from-int4": Row("paper", ("distill.loss=ce",)),
    "jsd-from-fp": Row("paper", (FROM_FP,)),
    "paper": Row("paper"),
    "default": Row("default"),
    "default-through-int4": Row("default", (THROUGH_INT4,)),
    "paper-fkl": Row("paper", ("distill.loss=fkl",)),
    "paper-beta-25": Row("paper", ("distill.loss={name: gjs, beta: 0.25}",)),
    "paper-beta-75": Row("paper", ("distill.loss={name: gjs, beta: 0.75}",)),
    "paper-rkl": Row("paper", ("distill.loss=rkl",)),
    "paper-cakld": Row("paper", ("distill.loss=cakld",)),
    "paper-int3": Row("paper", ("int4.bits=3",)),
    "paper-int8": Row("paper", ("int4.bits=8",)),
    "paper-symmetric": Row("paper", ("int4.grid=sym", "int2.grid=sym")),
    "paper-asymmetric": Row("paper", ("int4.grid=affine", "int2.grid=affine")),
    "default-symmetric": Row("default", ("int2.grid=sym",)),
    "default-q2_0": Row("default", ("int2.grid=q2_0",)),
    "default-asymmetric": Row("default", ("int2.grid=affine",)),
    "paper-mse": Row("paper", ("int2.method.scale=mse",)),
    "paper-hessian": Row("paper", ("int2.method.scale=hessian",)),
    "paper-block": Row("paper", ("int2.method={default.int2}",)),
    "jsd-from-fp-mse": Row("paper", (FROM_FP, "int2.method.scale=mse")),
    "jsd-from-fp-hessian": Row("paper", (FROM_FP, "int2.method.scale=hessian")),
    "jsd-from-fp-block": Row("paper", (FROM_FP, "int2.method={default.int2}")),
    "paper-conversations": Row("paper", data=("conversations",)),
    "paper-generated-text": Row("paper", data=("generated-text",)),
    "paper-generated-conversations": Row("paper", data=("generated-conversations",)),
    "paper-mixed": Row("paper", data=("documents", "generated-conversations")),
    "default-likeliest-answers": Row("default", ("data.generated.answer_temperature=0",)),
    "paper-g128": Row("paper", ("int2.group_size=128",)),
    "paper-g64": Row("paper", ("int2.group_size=64",)),
    "default-block-wise": Row("default", (NO_TRAINING,)),
    "default-scales": Row("default", ("distill.train_weights=false", "distill.scale_lr=5e-3")),
    "default-g128": Row("default", ("int2.group_size=128",)),
    "default-g64": Row("default", ("int2.group_size=64",)),
}
# Nothing in these depends on a seed.
UNSEEDED = (ORIGINAL, "int2-nearest", "int2-nearest-seq")


def budget(row: str, tokens: int) -> int:
    """Training tokens of a row where others have `tokens`: rows without training are the same at every budget."""
    return 0 if row == ORIGINAL or NO_TRAINING in ROWS[row].overrides else tokens


GROUPS: dict[str, Group] = {
    "main": Group(
        "The methods",
        {
            "original": ORIGINAL,
            "INT4, block-wise": "int4",
            "INT2, nearest between minimum and maximum": "int2-nearest",
            "INT2, nearest of SEQ": "int2-nearest-seq",
            "INT4 → INT2, nearest of SEQ": "int4-int2-nearest",
            "CE-QAT from FP": "ce-from-fp",
            "CE-QAT from INT4": "ce-from-int4",
            "JSD-QAT from FP": "jsd-from-fp",
            "`paper` (JSD-QAT from INT4)": "paper",
            "`default`": "default",
            "`default` through INT4": "default-through-int4",
            "`default`, the likeliest answers": "default-likeliest-answers",
        },
        every_seed=True,
    ),
    "beta": Group(
        "The loss: β of the generalised Jensen-Shannon divergence, and CAKLD",
        {
            "β → 0: KL(teacher‖student)": "paper-fkl",
            "β = ¼": "paper-beta-25",
            "β = ½ (`paper`)": "paper",
            "β = ¾": "paper-beta-75",
            "β → 1: KL(student‖teacher)": "paper-rkl",
            "CAKLD": "paper-cakld",
        },
    ),
    "bits": Group(
        "Bits of the intermediate stage",
        {
            "none": "jsd-from-fp",
            "3": "paper-int3",
            "4 (`paper`)": "paper",
            "8": "paper-int8",
            "none (`default`)": "default",
            "4, `default`": "default-through-int4",
        },
    ),
    "grid": Group(
        "The grid of both stages",
        {
            "SEQ (`paper`)": "paper",
            "symmetric": "paper-symmetric",
            "asymmetric": "paper-asymmetric",
            "SEQ (`default`)": "default",
            "symmetric, `default`": "default-symmetric",
            "asymmetric, `default`": "default-asymmetric",
            "-1, 0, 1, 2 (`q2_0`), `default`": "default-q2_0",
        },
    ),
    "scale": Group(
        "Where Δ starts at 2 bits, from INT4 and from FP",
        {
            "INT4, max (`paper`)": "paper",
            "INT4, mse": "paper-mse",
            "INT4, hessian": "paper-hessian",
            "INT4, block-wise": "paper-block",
            "FP, max": "jsd-from-fp",
            "FP, mse": "jsd-from-fp-mse",
            "FP, hessian": "jsd-from-fp-hessian",
            "FP, block-wise": "jsd-from-fp-block",
        },
    ),
    "data": Group(
        "Text for calibration and training",
        {
            "open documents (`paper`)": "paper",
            "conversations": "paper-conversations",
            "text by the original model": "paper-generated-text",
            "conversations by the original model": "paper-generated-conversations",
            "documents, and conversations by the original": "paper-mixed",
            "the same (`default`)": "default",
            "the same, its likeliest answers (`default`)": "default-likeliest-answers",
        },
    ),
    "granularity": Group(
        "Weights that share a scale",
        {
            "a row (`paper`)": "paper",
            "128": "paper-g128",
            "64": "paper-g64",
            "a row (`default`)": "default",
            "128, `default`": "default-g128",
            "64, `default`": "default-g64",
        },
    ),
    "trained": Group(
        "What learns after the block-wise stage",
        {
            "nothing": "default-block-wise",
            "scales and norms": "default-scales",
            "weights, scales and norms (`default`)": "default",
        },
        every_seed=True,
    ),
}

# Scores against training tokens: each multiple of the budget is a run of its own, with its whole schedule.
SHARES = (1 / 4, 1 / 2, 1, 2)
CURVES = {
    "CE-QAT from FP": "ce-from-fp",
    "CE-QAT from INT4": "ce-from-int4",
    "JSD-QAT from FP": "jsd-from-fp",
    "paper": "paper",
    "default": "default",
}


def budgets(tokens: int) -> list[int]:
    """Of the curves, where the tables have `tokens`."""
    return [int(tokens * share) for share in SHARES]


@dataclass(frozen=True, slots=True, order=True)
class Task:
    """One run of one row."""

    row: str
    seed: int
    tokens: int

    @classmethod
    def parse(cls, name: str) -> Task:
        row, seed, tokens = name.rsplit("@", 2)
        return cls(row, int(seed), int(tokens))

    def __str__(self) -> str:
        return f"{self.row}@{self.seed}@{self.tokens}"


def plan(groups: tuple[str, ...], *, seeds: int, tokens: int, only: str = "") -> list[Task]:
    """Runs of these groups (names of GROUPS, and `curves`) in order, each once."""
    found: dict[Task, None] = {}
    for name in groups:
        if name == "curves":
            found |= dict.fromkeys(Task(row, 0, spent) for row in CURVES.values() for spent in budgets(tokens))
            continue
        group = GROUPS[name]
        for seed in range(seeds if group.every_seed else 1):
            rows = [row for row in group.rows.values() if seed == 0 or row not in UNSEEDED]
            found |= dict.fromkeys(Task(row, seed, budget(row, tokens)) for row in rows)
    return [task for task in found if re.search(only, task.row)]

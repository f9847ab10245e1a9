"""What a run will need, stage by stage, before it starts: from the model's configuration and the recipe alone.

Each stage has its need in closed form (`upq.stages`); here they are held against a machine, and settings that save
memory are tried until the run fits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from upq.core.errors import UPQError
from upq.core.memory import resident_bytes
from upq.distill.optimizer import check as check_optimizer
from upq.model.coverage import coverage
from upq.model.sizes import Sizes, sizes_of
from upq.model.source import Source
from upq.run.recipe import Recipe
from upq.run.run import check as check_run
from upq.run.run import reading_of
from upq.stages import Planned
from upq.stages._need import check_need, data_need
from upq.stages._sizes import Machine, Need, Speed
from upq.stages._training import TrainingStage

__all__ = ["GPU_CONTEXT", "SCALES_ALONE", "Machine", "Plan", "Speed", "Stage", "check", "needs", "plan", "this_speed"]

# Of a GPU: CUDA's context, the libraries' workspaces, and what its allocator cannot use. Assumed, not measured.
GPU_CONTEXT = 10**9
# Heap that glibc keeps between small tensors that come and go, as a share of them. Fitted to runs of width 256 and 512,
# where it was 0.3 to 1.2 (docs/scale.md).
_SPARE = 0.6
_RESERVE = 0.1  # of the memory: as far as plans were off runs (docs/scale.md), and the system needs some
# Of the savings the one that is another training: codes stay as the block-wise stage has left them.
SCALES_ALONE = "distill.train_weights=false"


def check(config: PretrainedConfig, recipe: Recipe, name: str, *, allow_partial: bool = False) -> None:
    """Every error of model and recipe that shows without data. Raises UPQError."""
    model = Source.without_files(config)
    check_run(config, recipe, model, name)
    coverage(model.outline).check(name, allow_partial=allow_partial)


def needs(sizes: Sizes, recipe: Recipe, machine: Machine) -> dict[str, Need]:
    """What each stage of `recipe` needs, in their order."""
    reading, data = reading_of(recipe), recipe.data
    packing = {"data": data_need(rows=reading.rows + reading.validation, seq_len=reading.seq_len)}
    found, scheme, solved, stages = dict[str, Need](), None, 0, list(recipe.stages.items())
    for at, (name, stage) in enumerate(stages):
        if stage.demands(data).rows and "data" not in found:
            found |= packing
        latents = any(later.demands(data).start == "latents" for _, later in stages[at + 1 :])
        planned = Planned(reading, recipe.memory, "latents" if latents else "codes", scheme)
        found |= stage.need(name, sizes, machine, planned)
        if stage.solves:
            scheme, solved = stage.scheme(), solved + 1
    assert scheme is not None
    found["check"] = check_need(
        sizes,
        machine,
        seq_len=reading.seq_len,
        rows=reading.validation,
        on_disk=recipe.memory.activations == "disk",
        scheme=scheme,
        built_on=solved - 1,
        embeddings_bits=recipe.embeddings.bits,
        trained=any(stage.trains and stage.demands(data).rows > 0 for stage in recipe.stages.values()),
    )
    return packing | found if "data" not in found else found


# ---- what fits


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    tokens: int
    memory: int  # bytes, of one process, the program itself included
    disk: int  # bytes it leaves below --out/.work
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages of a run with `settings`, those beyond the recipe's that make it fit."""

    weights: int
    coded: int  # weights that become codes
    machine: Machine
    settings: tuple[str, ...]
    fits: bool
    stages: tuple[Stage, ...]
    coverage: str  # what becomes codes, and why the rest does not


@dataclass(frozen=True, slots=True)
class _Setting:
    """A saving of a stage, or of the header, as settings of the recipe; `rows` of the plan that it is for."""

    rank: int
    rows: frozenset[str]
    settings: tuple[str, ...]
    other_artefact: bool = False

    @property
    def keys(self) -> set[str]:
        return {setting.partition("=")[0] for setting in self.settings}


def _savings(recipe: Recipe) -> list[_Setting]:
    """In the order in which they are tried: what costs least first. The last ones make another artefact."""
    blockwise = {name for name, stage in recipe.stages.items() if stage.solves}
    cut = {row for name, stage in recipe.stages.items() if not stage.solves for row in (name, f"{name}.teacher")}
    found = [
        _Setting(0, frozenset(blockwise), ("memory.activations=disk",)),
        _Setting(3, frozenset(cut), ("memory.weights=sharded",)),
    ]
    for name, stage in recipe.stages.items():
        for saving in stage.savings:
            rows = {name, f"{name}.teacher"} | (blockwise if saving.other_artefact else set())
            settings = tuple(f"{name}.{setting}" for setting in saving.settings)
            found.append(_Setting(saving.rank, frozenset(rows), settings, saving.other_artefact))
    return sorted(found, key=lambda saving: saving.rank)


def plan(config: PretrainedConfig, recipe: Recipe, machine: Machine) -> Plan:
    """What `recipe` needs on `machine`, with as few savings as its stages ask for.

    They are to leave a tenth of the memory free; for that alone no other artefact is proposed.
    """
    program = GPU_CONTEXT if machine.gpus else resident_bytes()
    spare = 0.0 if machine.gpus else _SPARE
    room = machine.memory - int(_RESERVE * machine.memory)
    given, kept, sizes = recipe, list[_Setting](), sizes_of(config)

    def memory(recipe: Recipe) -> dict[str, int]:
        """Bytes of each stage's process."""
        return {name: _held(need, program, spare) for name, need in needs(sizes, recipe, machine).items()}

    found = memory(recipe)
    for saving in _savings(given):
        limit = machine.memory if saving.other_artefact else room
        tight = [name for name in saving.rows & found.keys() if found[name] > limit]
        if not tight or (saving.keys == {"memory.weights"} and machine.processes == 1):
            continue
        changed = recipe.changed(saving.settings)
        if not _installed(changed):
            continue
        fresh = memory(changed)
        if any(fresh[name] < found[name] for name in tight):
            recipe, found, kept = changed, fresh, [*(one for one in kept if not one.keys <= saving.keys), saving]
    # It saves so much that some tried before may not be needed, the costliest of them first.
    for saving in kept[-2::-1] if kept and kept[-1].other_artefact else ():
        fewer = [one for one in kept if one is not saving]
        settings = [setting for one in fewer for setting in one.settings]
        changed = given.changed(settings)
        fresh, own = memory(changed), saving.rows & found.keys()
        if all(found[name] <= room and fresh[name] <= room for name in own):
            recipe, found, kept = changed, fresh, fewer
    stages = tuple(
        Stage(name, need.tokens, found[name], need.disk, None if machine.speed is None else machine.speed.seconds(need))
        for name, need in needs(sizes, recipe, machine).items()
    )
    fits = all(stage.memory <= machine.memory for stage in stages)
    chosen = tuple(setting for saving in kept for setting in saving.settings)
    said = coverage(Source.without_files(config).outline).text(recipe.bits)
    return Plan(sizes.all, sizes.coded, machine, chosen, fits, stages, said)


def _held(need: Need, program: int, spare: float) -> int:
    return program + need.memory + int(spare * need.loose)


def _installed(recipe: Recipe) -> bool:
    """Whether the training's optimiser is on this machine."""
    try:
        for stage in recipe.stages.values():
            if isinstance(stage, TrainingStage):
                check_optimizer(stage)
    except UPQError:
        return False
    return True


def this_speed(*, seconds: float = 0.2) -> Speed:
    """Of this machine's processor: products in float32 and bfloat16, and a plain pass over memory."""
    side = 1024
    a, b = torch.randn(side, side), torch.randn(side, side)
    a16, b16 = a.bfloat16(), b.bfloat16()
    x, y = torch.ones(2**24), torch.empty(2**24)
    return Speed(
        flops=2 * side**3 / _seconds(lambda: torch.mm(a, b), seconds),
        moved=2 * x.nbytes / _seconds(lambda: torch.add(x, 1, out=y), seconds),
        flops_bf16=2 * side**3 / _seconds(lambda: torch.mm(a16, b16), seconds),
    )


def _seconds(run: Callable[[], object], least: float) -> float:
    run()
    began, done = time.monotonic(), 0
    while (spent := time.monotonic() - began) < least:
        run()
        done += 1
    return spent / done

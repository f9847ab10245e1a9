"""What a run will need, stage by stage, before it starts: from the model's configuration and the recipe alone.

Each stage has its need in closed form (`upq.stages`); here they are held against a machine, and settings that save
memory are tried until the run fits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from transformers import PretrainedConfig

from upq.core.config import decode, override
from upq.core.errors import UPQError
from upq.core.memory import resident_bytes
from upq.distill.optimizer import check as check_optimizer
from upq.model.loading import family
from upq.model.sizes import Sizes, sizes_of
from upq.model.streaming import StreamedModel
from upq.run.recipe import Recipe
from upq.run.run import (
    caches_teacher,
    check_lengths,
    check_original,
    check_plugins,
    sequences,
    to_be_written,
    trains_weights,
)
from upq.stages._need import blockwise_need, check_need, data_need, distill_need, generate_need, teacher_need
from upq.stages.sizes import Machine, Need, Speed

# Of a GPU: CUDA's context, the libraries' workspaces, and what its allocator cannot use. Assumed, not measured.
GPU_CONTEXT = 10**9
# Heap that glibc keeps between small tensors that come and go, as a share of them. Fitted to runs of width 256 and 512,
# where it was 0.3 to 1.2 (docs/scale.md).
_SPARE = 0.6
_RESERVE = 0.1  # of the memory: as far as plans were off runs (docs/scale.md), and the system needs some
# Of the savings the one that is another training: codes stay as the block-wise stage has left them.
SCALES_ALONE = "distill.train_weights=false"


def check(config: PretrainedConfig, recipe: Recipe, name: str) -> None:
    """Every error of model and recipe that shows without data. Raises UPQError."""
    family(config)
    check_original(config, name)
    check_plugins(recipe, StreamedModel.without_files(config))
    check_lengths(recipe, config)


def needs(sizes: Sizes, recipe: Recipe, machine: Machine) -> dict[str, Need]:
    """What each stage of `recipe` needs, in their order."""
    data, training = recipe.data, recipe.distill
    sharded, on_disk = recipe.memory.weights == "sharded", recipe.memory.activations == "disk"
    found: dict[str, Need] = {}
    if (section := to_be_written(recipe)) is not None:
        assert section.tokens is not None
        found["generate"] = generate_need(section, sizes, machine, tokens=section.tokens, sharded=sharded)
    found["data"] = data_need(rows=sequences(recipe) + data.validation, seq_len=data.seq_len)
    for name, stage, latents in (("int4", recipe.int4, False), ("int2", recipe.int2, trains_weights(recipe))):
        if stage is not None:
            found[name] = blockwise_need(stage, sizes, machine, seq_len=data.seq_len, on_disk=on_disk, latents=latents)
    if caches_teacher(recipe):
        found["teacher"] = teacher_need(training, sizes, machine, seq_len=data.seq_len)
    scheme = recipe.int2.scheme()
    found["distill"] = distill_need(training, sizes, machine, seq_len=data.seq_len, scheme=scheme, sharded=sharded)
    found["check"] = check_need(
        sizes,
        machine,
        seq_len=data.seq_len,
        rows=data.validation,
        on_disk=on_disk,
        scheme=scheme,
        before=None if recipe.int4 is None else recipe.int4.scheme(),
        embeddings_bits=recipe.embeddings.bits,
        trained=found["distill"].tokens > 0,
    )
    return found


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


@dataclass(frozen=True, slots=True)
class _Saving:
    """Settings that may save memory, and the stages that they are for."""

    stages: frozenset[str]
    settings: tuple[str, ...]

    def of(self, recipe: Recipe) -> Recipe:
        for setting in self.settings:
            recipe = with_setting(recipe, setting)
        return recipe

    @property
    def keys(self) -> set[str]:
        return {setting.partition("=")[0] for setting in self.settings}


_BLOCKWISE, _TRAINING = frozenset({"int4", "int2"}), frozenset({"teacher", "distill"})
_GENERATE = frozenset({"generate"})
_SCALES_ALONE = _Saving(_TRAINING | {"int2"}, (SCALES_ALONE, "distill.scale_lr=5e-3"))
# In the order in which they are tried: what costs least first. The last one makes another artefact.
_SAVINGS = (
    _Saving(_BLOCKWISE, ("memory.activations=disk",)),
    _Saving(_TRAINING, ("distill.chunk_tokens=256",)),
    _Saving(_TRAINING, ("distill.micro_batch_size=1",)),
    _Saving(_TRAINING | _GENERATE, ("memory.weights=sharded",)),
    # After what the training mostly asks for anyway: fewer conversations at a time take as many times longer.
    _Saving(_GENERATE, ("data.generated.batch_size=32",)),
    _Saving(_GENERATE, ("data.generated.batch_size=8",)),
    _Saving(_TRAINING, ("distill.gradient_checkpointing=true",)),
    _Saving(_TRAINING, ("distill.teacher=offloaded",)),
    _Saving(_TRAINING, ("distill.optimizer=adamw8bit",)),
    _SCALES_ALONE,
)


def plan(config: PretrainedConfig, recipe: Recipe, machine: Machine) -> Plan:
    """What `recipe` needs on `machine`, with as few savings as its stages ask for.

    They are to leave a tenth of the memory free; for that alone no other artefact is proposed.
    """
    program = GPU_CONTEXT if machine.gpus else resident_bytes()
    spare = 0.0 if machine.gpus else _SPARE
    room = machine.memory - int(_RESERVE * machine.memory)
    given, kept, sizes = recipe, list[_Saving](), sizes_of(config)

    def memory(recipe: Recipe) -> dict[str, int]:
        """Bytes of each stage's process."""
        return {name: _held(need, program, spare) for name, need in needs(sizes, recipe, machine).items()}

    found = memory(recipe)
    for saving in _SAVINGS:
        limit = machine.memory if saving is _SCALES_ALONE else room
        tight = [name for name in saving.stages & found.keys() if found[name] > limit]
        if not tight or (saving.keys == {"memory.weights"} and machine.processes == 1):
            continue
        changed = saving.of(recipe)
        try:
            check_optimizer(changed.distill)
        except UPQError:  # an optimiser that is not installed here
            continue
        fresh = memory(changed)
        if any(fresh[name] < found[name] for name in tight):
            recipe, found, kept = changed, fresh, [*(one for one in kept if not one.keys <= saving.keys), saving]
    # It saves so much that some tried before may not be needed, the costliest of them first.
    for saving in kept[-2::-1] if _SCALES_ALONE in kept else ():
        fewer = [one for one in kept if one is not saving]
        changed = reduce(lambda recipe, one: one.of(recipe), fewer, given)
        fresh, own = memory(changed), saving.stages & found.keys()
        if all(found[name] <= room and fresh[name] <= room for name in own):
            recipe, found, kept = changed, fresh, fewer
    stages = tuple(
        Stage(name, need.tokens, found[name], need.disk, None if machine.speed is None else machine.speed.seconds(need))
        for name, need in needs(sizes, recipe, machine).items()
    )
    fits = all(stage.memory <= machine.memory for stage in stages)
    settings = tuple(setting for saving in kept for setting in saving.settings)
    return Plan(sizes.all, sizes.coded, machine, settings, fits, stages)


def _held(need: Need, program: int, spare: float) -> int:
    return program + need.memory + int(spare * need.loose)


def with_setting(recipe: Recipe, setting: str) -> Recipe:
    """The recipe with one key overridden, `dotted.key=yaml value`."""
    raw = recipe.model_dump(mode="json")
    override(raw, setting)
    return decode(Recipe, raw, setting)


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

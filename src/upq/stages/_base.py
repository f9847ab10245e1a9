"""What a stage of a run is: settings, the state that passes through, and what the run lends it.

A stage does not know the recipe or another stage. It declares what it needs of the stages before it (`Demands`), gets
a `ModelState` and gives back the next one. The runner (`upq.run.run`) does the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from transformers import PreTrainedTokenizerBase

from upq.blockwise import BlockStore
from upq.core.act_scheme import ActScheme
from upq.core.config import Strict, fixed, free
from upq.core.precision import Precision, computes_in_bf16
from upq.core.processes import Processes
from upq.core.progress import Progress
from upq.core.registry import Registry
from upq.core.scheme import QuantScheme
from upq.core.signals import Stop
from upq.data.config import Data, TextSource
from upq.data.tokens import TokenSet
from upq.files.metrics import Metrics
from upq.model.activations import Allocate, allocator
from upq.model.loading import load_config, text_config
from upq.model.source import Source
from upq.stages._sizes import Machine, Need, Saving, Sizes

Start = Literal["latents", "codes"]  # what a stage reads of the solved blocks: weights that learn, or codes alone


class Memory(Strict):
    """Where a run keeps what it works on. Results do not depend on it, but for the rounding of sums over processes."""

    activations: Literal["memory", "disk"] = free("memory")  # hidden states of the calibration rows
    # Under torchrun, of conversations and training: a copy in each process, or shards over all of them (FSDP2).
    weights: Literal["replicated", "sharded"] = free("replicated")


@dataclass(frozen=True, slots=True)
class Demands:
    """What a stage needs: `rows` of packed text, and of the blocks solved before it the `start`.

    `codes_alone`: it has no weights to leave behind, so no stage that trains weights can follow. `widths`: a stage
    before it must have chosen them.
    """

    rows: int = 0
    start: Start | None = None
    codes_alone: bool = False
    widths: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """The text that a run reads: rows of `seq_len` tokens to learn from and to hold out.

    `weight` is the sum of the weights of the recipe's sources.
    """

    seq_len: int
    rows: int
    validation: int
    weight: float

    @property
    def tokens(self) -> int:
        return (self.rows + self.validation) * self.seq_len


@dataclass(frozen=True, slots=True)
class ModelState:
    """All that passes from stage to stage. What is large lies on disk, so a state is restored from a few lines.

    `digest` names the model, the data and the settings of every stage so far.
    """

    digest: str
    text: tuple[TextSource, ...] = ()  # written by stages, beside the recipe's sources
    solved: BlockStore | None = None  # blocks of the last stage that quantised or trained
    built_on: tuple[BlockStore, ...] = ()  # blocks that a later block-wise stage started from
    model: Path | None = None  # the original as a stage has transformed it; None: as it was given
    norms: Path | None = None  # trained norms, by parameter name
    skipped_steps: tuple[int, ...] = ()  # of trainings: their loss or gradient was not finite
    widths: tuple[Mapping[str, int], ...] = ()  # by block and weight, the bits that a stage has chosen
    answers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by stage, what a student has written

    def dump(self, work: Path) -> dict[str, Any]:
        """As JSON types; paths are relative to `work`, so that the folder can be moved."""
        return {
            "digest": self.digest,
            "text": [
                source.model_copy(update={"path": _relative(source.path, work)}).model_dump(mode="json")
                for source in self.text
            ],
            "solved": None if self.solved is None else _store(self.solved, work),
            "built_on": [_store(store, work) for store in self.built_on],
            "model": None if self.model is None else _relative(self.model, work),
            "norms": None if self.norms is None else _relative(self.norms, work),
            "skipped_steps": list(self.skipped_steps),
            "widths": [dict(each) for each in self.widths],
            "answers": {name: dict(figures) for name, figures in self.answers.items()},
        }

    @classmethod
    def restore(cls, raw: Mapping[str, Any], work: Path) -> Self:
        """What `dump` gave."""

        def store(raw: Mapping[str, Any]) -> BlockStore:
            scheme, widths = QuantScheme(**raw["scheme"]), tuple(raw.get("widths", ()))
            rounded = {key: ActScheme(**raw[key]) for key in ("activations", "kv") if key in raw}
            return BlockStore(work / raw["folder"], scheme, raw["latents"], widths, **rounded)

        return cls(
            raw["digest"],
            tuple(TextSource(**{**source, "path": str(work / source["path"])}) for source in raw["text"]),
            None if raw["solved"] is None else store(raw["solved"]),
            tuple(store(each) for each in raw["built_on"]),
            norms=None if raw["norms"] is None else work / raw["norms"],
            model=work / raw["model"] if raw.get("model") else None,
            skipped_steps=tuple(raw["skipped_steps"]),
            widths=tuple(raw.get("widths", ())),
            answers=raw.get("answers", {}),
        )


def _relative(path: str | Path, work: Path) -> str:
    return str(Path(path).relative_to(work))


def _store(store: BlockStore, work: Path) -> dict[str, Any]:
    plain = {"folder": _relative(store.folder, work), "scheme": asdict(store.scheme), "latents": store.latents}
    for key, scheme in (("activations", store.activations), ("kv", store.kv)):
        plain |= {} if scheme is None else {key: scheme.model_dump(mode="json")}
    return plain | ({"widths": [dict(each) for each in store.widths]} if store.widths else {})


@dataclass(frozen=True)
class Job:
    """What the run lends a stage for one call of `run`."""

    name: str  # of the stage
    folder: Path  # the stage's own
    model: Path  # directory of the original, or of what a stage has made of it
    seed: int
    device: str
    processes: Processes
    progress: Progress
    stop: Stop
    memory: Memory
    keep: Start  # what the stages after this one read of its blocks
    cpu_dtype: torch.dtype  # of products on the CPU where `precision` is auto: what the stage began with
    data: Data
    reading: Reading
    rows: Callable[[], TokenSet]  # the packed text; the stage must have demanded rows
    metrics: Metrics  # figures as they come; no result depends on them

    @property
    def sharded(self) -> bool:
        return self.memory.weights == "sharded" and self.processes.world > 1

    def source(self, **options: Any) -> Source:
        """The original, read block by block."""
        return Source(self.model, device=self.device, **options)

    def settled(self, precision: Precision) -> Precision:
        """bf16 or fp32 for `auto`: a stage ends in the type that it began with, on whatever CPU."""
        width, device = text_config(load_config(self.model)).hidden_size, torch.device(self.device)
        return "bf16" if computes_in_bf16(precision, device, width, self.cpu_dtype) else "fp32"

    def activations(self) -> AbstractContextManager[Allocate]:
        return allocator(self.folder if self.memory.activations == "disk" else None)

    @property
    def device_type(self) -> str:
        return torch.device(self.device).type


@dataclass(frozen=True, slots=True)
class Planned:
    """What a plan has of a run before it starts, for one stage."""

    reading: Reading
    memory: Memory
    keep: Start  # what the stages after it read of its blocks
    scheme: QuantScheme | None  # of the blocks that were solved before it

    @property
    def sharded(self) -> bool:
        return self.memory.weights == "sharded"


class Stage(Strict):
    """One step of a run: its settings are its fields. The name of its file is its kind.

    Laws (tests/test_stages.py, over the registry): killed and run again = never killed; run twice = once; a free
    setting changes no byte; another setting of a later stage keeps the files of the earlier ones.
    """

    kind: ClassVar[str]
    savings: ClassVar[tuple[Saving, ...]] = ()  # own settings that save memory
    solves: ClassVar[bool] = False  # it leaves blocks as codes
    trains: ClassVar[bool] = False  # it starts from solved blocks
    transforms: ClassVar[bool] = False  # it changes weights that no stage has solved yet
    chooses_widths: ClassVar[bool] = False  # of weights, for stages after it

    def scheme(self) -> QuantScheme | None:
        """Of the codes that it leaves; None for a stage that solves no blocks."""
        return None

    def line(self, name: str) -> str | None:
        """What the manifest says of a stage that changes weights before they are solved."""
        return None

    def learns(self, scheme: QuantScheme) -> bool:
        """Whether it has anything to learn from blocks on `scheme`, if it trains."""
        return True

    def check_start(self, name: str, scheme: QuantScheme) -> None:
        """Raises UPQError if it cannot start from blocks on `scheme`."""

    def check(self, name: str, model: Source, data: Data) -> None:
        """Raises UPQError for every fault that shows without data. `name` is that of the stage in its recipe."""

    def check_text(self, tokenizer: PreTrainedTokenizerBase, ends: list[int], rows: int) -> None:
        """Raises UPQError for every fault that shows from the tokenizer.

        `ends`: the ids that end an answer; `rows`: of the embedding.
        """

    @abstractmethod
    def demands(self, data: Data) -> Demands: ...

    @abstractmethod
    def cost(self, name: str, blocks: int, reading: Reading) -> dict[str, tuple[int, float]]:
        """By label of the progress bar: units, and the cost of all in passes of one token through one block."""

    @abstractmethod
    def need(self, name: str, sizes: Sizes, machine: Machine, planned: Planned) -> dict[str, Need]:
        """By row of the plan: memory, disk and work of one process, in closed form (tests/test_plan.py)."""

    @abstractmethod
    def run(self, job: Job, state: ModelState) -> ModelState:
        """Do the stage's work in `job.folder`, going on from what an earlier call left there.

        Under torchrun every process calls it.
        """

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as JSON types."""
        return {"stage": self.kind, **fixed(self)}


STAGES: Registry[type[Stage]] = Registry("upq.stages", "stage")


def register(kind: str) -> Callable[[type[Stage]], type[Stage]]:
    def add(cls: type[Stage]) -> type[Stage]:
        cls.kind = kind
        return STAGES.register(kind)(cls)

    return add

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from upq.core.act_scheme import ActScheme
from upq.core.config import Strict
from upq.core.precision import dtype_name
from upq.core.progress import Progress
from upq.core.registry import Registry
from upq.core.scheme import QuantScheme
from upq.exports._checkpoint import as_checkpoint
from upq.exports._source import Form, Source, Weight, plain
from upq.files.tensors import TensorPlan

Rows = Callable[[int, int], Tensor]  # (start, stop) to these rows of a weight


class Options(Strict):
    """What every format takes; each adds its own."""

    allow_inexact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a weight of the artefact goes: the engine's own type for it, its size there, and what is lost."""

    weight: Weight
    carrier: str
    bytes: int
    loss: str | None = None  # why the carrier cannot hold the weight exactly; None where it can
    tensors: tuple[TensorPlan, ...] = ()  # what is written for it, where the format writes tensors

    @property
    def packed(self) -> bool:
        """Whether it is codes, scales and what goes with them; a dense weight is one tensor of its own name."""
        return len(self.tensors) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Decided before anything is written."""

    placements: tuple[Placement, ...]
    notes: tuple[str, ...] = ()  # for the reader of the report
    dtype: torch.dtype = torch.float32  # of what the format does not pack
    # What is read back is compared with the artefact's weights in this type. Anything but float32 means: as the packed
    # model computes, which rounds the exact weight once to the type of the model.
    compared_in: torch.dtype = torch.float32

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)


class Exporter(ABC):
    """One engine's files.

    Law (tests/test_exports.py): a weight without `loss` reads back as the artefact's, bit for bit.
    """

    Config: ClassVar[type[Options]] = Options
    packages: ClassVar[tuple[str, ...]]  # distributions that write the format and read it back
    install: ClassVar[str] = "'upq[export]'"  # what pip installs them by
    suffix: ClassVar[str | None] = None  # of the one file it consists of; None: a directory
    checked: ClassVar[str]  # how `read` reads, for the report
    forms: ClassVar[frozenset[Form]] = frozenset({"linear"})  # of quantised weights that it holds

    def __init__(self, options: Options) -> None:
        self.options = options

    def view(self, source: Source) -> Source:
        """The artefact with the names and forms that the engine reads: what `plan` gets and is compared with."""
        return as_checkpoint(source)

    def holds(self, scheme: QuantScheme) -> bool:
        """Whether the format has a place for levels and scales of this kind."""
        return plain(scheme)

    def carries(self, activations: ActScheme) -> bool:
        """Whether the engine rounds the inputs of linears by such a scheme. The report says where it does not."""
        return False

    @abstractmethod
    def plan(self, source: Source) -> Plan:
        """A place for every weight; UPQError where the engine cannot run the model at all."""

    @abstractmethod
    def write(self, source: Source, plan: Plan, out: Path, progress: Progress) -> None:
        """Write the file, or make the directory, `out`; one `progress.advance()` for each weight."""

    @abstractmethod
    def read(self, source: Source, plan: Plan, out: Path) -> Iterator[tuple[str, Rows]]:
        """Every weight as the engine reads it, by its name in the artefact, in float32."""


EXPORTS: Registry[type[Exporter]] = Registry("upq.exports", "export format")

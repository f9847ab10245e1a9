"""The directory of a run: what it belongs to, which stages it holds, and what another recipe would throw away.

While a run is under way `out` holds `.work/`: its record (run.json), the packed text, and a folder for each stage. The
artefact's own files appear at the end, `upq.json` last; then `.work/` goes. Several runs may share the folders of their
stages (`work`): there a folder has its stage's digest in its name.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from upq.artifact.manifest import MANIFEST, read_manifest
from upq.core.bounded import read_json
from upq.core.config import Strict, decode, digest
from upq.core.errors import UPQError
from upq.core.memory import give_back, peak_memory_bytes
from upq.core.progress import Progress
from upq.data.config import Data
from upq.data.sources import identity, sources_of
from upq.files.atomic import atomic_write, write_errors
from upq.files.digests import digest_of
from upq.files.lock import lock
from upq.files.tensors import keys_required
from upq.run.recipe import Recipe, flat, stages_at_top, stages_together
from upq.run.tracking import TRACKING
from upq.stages import ModelState

WORK = ".work"
LOCK = ".lock"
Keep = Literal["latents", "codes"]
CpuType = Literal["float32", "bfloat16"]


class Record(Strict):
    """`run.json`."""

    model: str  # digest over `files`
    files: dict[str, str] = Field(default_factory=dict)  # of the model, to their SHA-256
    recipe: dict[str, Any]
    sources: list[str] = Field(default_factory=list)  # what the recipe's sources were made of
    seconds: dict[str, float] = Field(default_factory=dict)  # by stage
    peak_memory_bytes: dict[str, int] = Field(default_factory=dict)  # by stage: of the process up to its end
    cpu_dtype: CpuType = "float32"  # of products on the CPU, where nobody has named a type
    shared: dict[str, str] = Field(default_factory=dict)  # by stage: its folder, where runs share them

    def stages(self) -> list[str]:
        """In their order."""
        return list(stages_together(self.recipe, "run.json")["stages"])

    def folder(self, out: Path, stage: str) -> Path:
        return Path(self.shared.get(stage, out / WORK / stage))


class Stamp(Strict):
    """`stage.json`: what a stage's folder was begun with and, once the stage is finished, the state after it."""

    digest: str
    keep: Keep
    state: dict[str, Any] | None = None
    seconds: float = 0.0  # that it took, over all calls
    cpu_dtype: CpuType = "float32"  # of the run that began it


@dataclass(frozen=True)
class Place:
    """A stage's folder, and the digest of what belongs there."""

    name: str
    folder: Path
    digest: str
    keep: Keep

    @property
    def _file(self) -> Path:
        return self.folder / "stage.json"

    def stamp(self) -> Stamp | None:
        if not self._file.is_file():
            return None
        return decode(Stamp, read_json(self._file, remedy=f"delete {self.folder} to begin it anew"), str(self._file))

    def holds_other_work(self) -> bool:
        """Whether the folder holds what this stage cannot go on from: of other settings, or codes without latents."""
        stamp = self.stamp()
        if stamp is None:
            return False
        return stamp.digest != self.digest or (self.keep == "latents" and stamp.keep == "codes")

    def begin(self, on_cpu: CpuType) -> Stamp:
        """Make the folder ready, without what other settings left there. Returns what the stage was begun with."""
        if self.holds_other_work():
            shutil.rmtree(self.folder)
        stamp = self.stamp()
        if stamp is None:
            with write_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            stamp = Stamp(digest=self.digest, keep=self.keep, cpu_dtype=on_cpu)
            self._write(stamp)
        return stamp

    def state(self) -> ModelState | None:
        """The state after the stage, where it is finished."""
        stamp = self.stamp()
        if stamp is None or stamp.state is None:
            return None
        with keys_required(self._file):
            return ModelState.restore(stamp.state, self.folder.parent)

    def seconds(self) -> float:
        stamp = self.stamp()
        return 0.0 if stamp is None else stamp.seconds

    def finish(self, state: ModelState, seconds: float) -> None:
        stamp = self.stamp()
        assert stamp is not None
        self._write(stamp.model_copy(update={"state": state.dump(self.folder.parent), "seconds": seconds}))

    def _write(self, stamp: Stamp) -> None:
        atomic_write(self._file, json.dumps(stamp.model_dump(mode="json"), indent=1))


@dataclass
class RunDirectory:
    """One run in its directory: record, places of its stages, clocks."""

    out: Path
    shared: Path | None  # where several runs keep their stages
    name: str  # of the model, as it was asked for
    files: dict[str, str]  # of the model, to their SHA-256
    recipe: Recipe
    writes: bool  # False in all processes but the first
    cpu_dtype: CpuType  # what this CPU is faster in, or what the run began with
    sources: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.out / WORK

    @property
    def model_digest(self) -> str:
        return digest_of(self.files)

    @property
    def record(self) -> Path:
        return self.work / "run.json"

    def open(self, progress: Progress, held: ExitStack, *, redo: bool) -> bool:
        """Check that model, recipe and directory go together; False where the artefact is there already.

        The process that writes has the directory to itself until `held` is closed. `redo` agrees to do stages anew
        whose settings are others now, and to replace a finished artefact.
        """
        self._check_out()
        if self.writes and (self.recipe.export or not self._finished or self.work.exists()):
            held.enter_context(lock(self.out / LOCK, progress.note))
            sweep(self.work)
            for path in (self.out / "exports").glob(".*.tmp"):
                remove(path)
        record = read_record(self.out)
        self.sources = [identity(source) for source in sources_of(self.recipe.data)]
        if self._finished:
            manifest = read_manifest(self.out)
            self._check_model(manifest.model.digest, {})
            if _settings(manifest.recipe, self.recipe) == self.recipe.settings():
                return False
            if not redo and (record is None or _settings(record.recipe, self.recipe) != self.recipe.settings()):
                self._refuse(manifest.recipe, manifest.seconds, self._unfinished())
        elif record is None and any(path.name not in (WORK, LOCK, TRACKING) for path in self.out.iterdir()):
            raise UPQError(f"{self.out}: not empty, and no UPQ run is in it; name a new directory")
        if record is not None:
            self._check_model(record.model, record.files)
            self.seconds = dict(record.seconds)
            self.peak_memory_bytes = dict(record.peak_memory_bytes)
            if record.cpu_dtype != self.cpu_dtype:
                progress.note(
                    f"{self.out}: goes on in {record.cpu_dtype} on the CPU, as it began, not {self.cpu_dtype}"
                )
                self.cpu_dtype = record.cpu_dtype
            if not redo and (lost := self._other_work()):
                self._refuse(record.recipe, record.seconds, lost, record.sources)
        with write_errors(self.work):
            self.work.mkdir(exist_ok=True)
        return True

    def places(self) -> dict[str, Place]:
        """The folder of every stage, in order. A digest names the model, the data and the settings up to the stage.

        How much text is read is not in it: that follows from what later stages ask for, and a stage keeps its rows.
        """
        here, read = digest({"model": self.model_digest, "seed": self.recipe.seed}), False
        found = {}
        for name, stage in self.recipe.stages.items():
            if stage.demands(self.recipe.data).rows and not read:
                here, read = digest(here, _text(self.recipe.data, self.sources)), True
            here = digest(here, stage.settings())
            folder = self.work / name if self.shared is None else self.shared / f"{name}-{here}"
            found[name] = Place(name, folder, here, self._keep(name))
        return found

    def write_record(self) -> None:
        if self.writes:
            shared = {} if self.shared is None else {n: str(p.folder.resolve()) for n, p in self.places().items()}
            record = Record(
                model=self.model_digest,
                files=self.files,
                recipe=self.recipe.model_dump(mode="json"),
                sources=self.sources,
                seconds=self.seconds,
                peak_memory_bytes=self.peak_memory_bytes,
                cpu_dtype=self.cpu_dtype,
                shared=shared,
            )
            atomic_write(self.record, json.dumps(record.model_dump(mode="json"), indent=1))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time within to the stage's clock, which outlives an interruption of the run."""
        before, began = self.seconds.get(name, 0.0), time.monotonic()
        failed = True
        try:
            yield
            failed = False
        finally:
            self.peak_memory_bytes[name] = peak_memory_bytes()
            give_back()  # the next stage's peak is its own
            self.seconds[name] = before + time.monotonic() - began
            if self.record.is_file():
                # On a full disk the stage's own error is the one to be shown.
                with suppress(UPQError) if failed else nullcontext():
                    self.write_record()

    @property
    def _finished(self) -> bool:
        return (self.out / MANIFEST).is_file()

    def _check_out(self) -> None:
        out = self.out
        if out.exists() and not out.is_dir():
            raise UPQError(f"{out}: is a file; --out wants a directory")
        if self._finished or (out / WORK).is_dir() or not out.is_dir():
            return
        if any(path.name != LOCK for path in out.iterdir()):
            raise UPQError(f"{out}: not empty, and no UPQ run is in it; name a new directory")

    def _keep(self, name: str) -> Keep:
        """What the next stage that starts from this one's blocks needs of them."""
        if self.shared is not None:
            return "latents"  # they serve every later run
        names = list(self.recipe.stages)
        later = (self.recipe.stages[other].demands(self.recipe.data).start for other in names[names.index(name) + 1 :])
        return next((start for start in later if start is not None), "codes")

    def _other_work(self) -> list[str]:
        return [name for name, place in self.places().items() if place.holds_other_work()]

    def _unfinished(self) -> list[str]:
        """Stages of which no folder holds the result."""
        return [name for name, place in self.places().items() if place.holds_other_work() or place.state() is None]

    def _check_model(self, model: str, files: Mapping[str, str]) -> None:
        """`files`: their digests as the run began, where they are known, to name the one that differs."""
        if model == self.model_digest:
            return
        changed = [name for name in sorted(files.keys() | self.files) if files.get(name) != self.files.get(name)]
        where = ""
        if files:
            sha256 = [of.get(changed[0], "that of no file") for of in (files, self.files)]
            where = f": sha256 of {changed[0]} was {sha256[0]} and is now {sha256[1]}"
        remedy = "give the same command as before, or another --out"
        raise UPQError(f"{self.out}: belongs to another model than {self.name}{where}; {remedy}")

    def _refuse(
        self, recipe: dict[str, Any], seconds: Mapping[str, float], lost: list[str], sources: list[str] | None = None
    ) -> None:
        """Say what differs and what it costs."""
        was, now = _settings(recipe, self.recipe), self.recipe.settings()
        differing = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
        if sources is not None and sources != self.sources and not any(k.startswith("data.sources") for k in differing):
            what = "the data has changed since this run began; restore it"
        elif differing:
            key = differing[0]
            what = f"belongs to another recipe: {key} was {was.get(key)!r} and is now {now.get(key)!r}"
        else:
            what = "holds the stages of another version"
        kept = [name for name, place in self.places().items() if name not in lost and place.stamp() is not None]
        spent = sum(seconds.get(name, 0.0) for name in lost)
        costs = f"{', '.join(lost)} would be done anew ({spent:.0f} s so far)" if lost else "it would be packed anew"
        costs += f", {', '.join(kept)} kept" if kept else ""
        remedy = "agree with --redo, give the same command as before, or another --out"
        raise UPQError(f"{self.out}: {what}; {costs}; {remedy}")


def read_record(out: Path) -> Record | None:
    """Of the run in `out` that has not ended, or whose work was kept."""
    path = out / WORK / "run.json"
    if not path.is_file():
        return None
    return decode(Record, read_json(path, remedy=f"delete {path.parent} to begin anew"), str(path))


def sweep(folder: Path) -> None:
    """Remove what killed writers left half done. With the lock held, nobody is at work on any of it."""
    for path in [path for path in folder.rglob(".*") if path.name != LOCK]:
        remove(path)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # it may have gone with its directory


def _settings(recipe: dict[str, Any], now: Recipe) -> dict[str, Any]:
    """Of a recipe that a run has written, an earlier version's too: keys that have come since have their defaults."""
    try:
        return Recipe.of(recipe, "recipe").settings()
    except UPQError:  # of a key that has gone since
        free = flat(stages_at_top(now.model_dump(mode="json"))).keys() - now.settings().keys()
        return {key: value for key, value in flat(stages_at_top(recipe)).items() if key not in free}


def _text(data: Data, identities: list[str]) -> dict[str, Any]:
    """What the packed text is made of, wherever its files lie."""
    sources = [
        {**source.model_dump(mode="json", exclude={"path"}), "content": content}
        for source, content in zip(sources_of(data), identities, strict=True)
    ]
    return {**data.model_dump(mode="json"), "sources": sources}

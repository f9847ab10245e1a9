"""The whole way from a model to its 2-bit artefact: each stage takes up what is on disk, does the rest and writes it.

While a run is under way its directory holds `.work/`: what the run is (run.json), packed tokens, solved blocks, the
training state. The artefact's own files appear at the end, `upq.json` last; then `.work/` goes.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from pydantic import Field, ValidationError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel

from upq.artifact.manifest import MANIFEST, Manifest, SourceModel, read_manifest
from upq.artifact.publish import publish
from upq.artifact.size import model_size, weights_bytes
from upq.artifact.transformers import load, write_artifact
from upq.blockwise import METHODS, BlockStore, Method, walk
from upq.core.bounded import read_json
from upq.core.config import Strict, decode, digest
from upq.core.errors import UPQError
from upq.core.memory import give_back, peak_memory_bytes, trim
from upq.core.processes import Processes
from upq.core.progress import Progress, Silent
from upq.core.scheme import QTensor
from upq.core.signals import Stop
from upq.data.config import Data, Generated, Source
from upq.data.generated import write_conversations
from upq.data.packing import prepare
from upq.data.sources import identity, sources_of
from upq.data.tokens import TokenSet
from upq.distill.optimizer import check as check_optimizer
from upq.distill.sharding import load_sharded
from upq.distill.student import freeze, load_student, make_student, norm_weight, norms
from upq.distill.teacher import CachedTeacher, StreamedTeacher, Teacher, write_cache
from upq.distill.teacher import check as check_teacher
from upq.distill.trainer import distill, settled, skipped_steps, steps
from upq.evals.text import Streamed, TextMetrics, evaluate_text, streamed
from upq.exports import beside, exporter
from upq.files.atomic import atomic_write, write_errors
from upq.files.digests import digest_of, model_digests
from upq.files.lock import lock
from upq.kernels import computing
from upq.losses import LOSSES
from upq.model.activations import Allocate, allocator
from upq.model.loading import check_finite, family, generation_config, load_config, load_model, load_tokenizer
from upq.model.sharding import load_original, make_mesh
from upq.model.streaming import StreamedModel
from upq.nn.packed import Codes
from upq.nn.trained import full_tensor
from upq.run.recipe import Recipe
from upq.stages.blockwise import Blockwise

T = TypeVar("T")

WORK = ".work"
LOCK = ".lock"
# What may change between one command and the next: exports come after the artefact and can be added to it, where things
# lie and what is computed twice changes no result, and a run that has met no bad step is the run of any number of them.
_FREE = ("export", "memory", "distill.skip_bad_steps", "distill.gradient_checkpointing")
_PATIENCE = timedelta(days=30)  # other processes wait that long for what the first one does alone


def quantize(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "auto",
    keep_work: bool = False,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Manifest:
    """Quantise a Hugging Face causal LM (directory or hub id) into the directory `out`, or go on where a run stopped.

    Under torchrun all processes share the writing of conversations, the block-wise stages and the training; the rest is
    the first one's.
    Raises UPQError, with nothing changed, where `out` holds something else: another model, recipe or data, or where
    another process is at work in it. `stop` ends the training after a step, its state saved, by raising Stopped.
    """
    with ExitStack() as held:
        return _quantize(model, recipe, Path(out), device, keep_work, progress, stop or Stop(), held)


def _quantize(
    model: str | Path,
    recipe: Recipe,
    out: Path,
    device: str,
    keep_work: bool,
    progress: Progress | None,
    stop: Stop,
    held: ExitStack,
) -> Manifest:
    target = _device(device)
    processes = PartialState(cpu=target == "cpu", timeout=_PATIENCE)
    if target == "cuda":
        target = str(processes.device)  # a GPU for each process
    progress = (progress or Silent()) if processes.is_main_process else Silent()
    shares = Processes(processes.process_index, processes.num_processes, target)
    with processes.main_process_first():  # the others then find the directory as it has left it
        run = _Run.open(_local(model), recipe, out, target, progress, held, writes=processes.is_main_process)
        if run is None:
            if processes.is_main_process and (out / WORK).exists() and not keep_work:
                shutil.rmtree(out / WORK)  # a run that was killed in its last moments has left it
            progress.note(f"{out} is finished already: nothing to do")
            if recipe.export:
                progress.plan({"export": (len(recipe.export), 1.0)})
            if processes.is_main_process:
                _export(recipe, out, progress)
            return read_manifest(out)
    if (section := to_be_written(recipe)) is not None:
        with run.timed("generate"):
            run.generate(section, shares)
    with processes.main_process_first(), run.timed("data"):  # the others then find the data on disk
        data = run.data()
    if recipe.int4 is not None:
        with run.timed("int4"):
            run.blockwise("int4", recipe.int4, data, shares)
    with run.timed("int2"):
        run.blockwise("int2", recipe.int2, data, shares)
    if caches_teacher(recipe):
        with processes.main_process_first(), run.timed("teacher"):
            run.cache_teacher(data)
    with run.timed("distill"):
        trained = run.distill(data, stop, shares)
    if processes.is_main_process:
        with run.timed("check"):
            run.write(data, trained)
            del trained  # the codes, a byte a weight
            trim()  # after packing, 240 MB at width 1024
            manifest = run.finish(data)
        run.publish(manifest)
        if not keep_work:
            shutil.rmtree(run.work)
        _export(recipe, out, progress)
    processes.wait_for_everyone()
    return read_manifest(out)


def _export(recipe: Recipe, out: Path, progress: Progress) -> None:
    """Every export that is not there yet, below `out/exports`. One that fails stops neither the others nor the run."""
    if not recipe.export:
        return
    progress.start("export")
    failed = []
    for plugin in recipe.export:
        try:
            beside(out, plugin.name, options=plugin.model_extra, progress=progress)
        except UPQError as error:
            failed.append(f"{plugin.name} ({error})")
        progress.advance(1)
    if failed:
        raise UPQError(f"{out} is finished, but not its export {', '.join(failed)}; mend it and run the command again")


@dataclass(frozen=True)
class _Trained:
    qtensors: Codes
    norms: dict[str, torch.Tensor]


class _State(Strict):
    """`run.json`."""

    model: str  # digest over `files`
    files: dict[str, str] = Field(default_factory=dict)  # of the model, to their SHA-256
    recipe: dict[str, Any]
    seconds: dict[str, float]  # by stage


@dataclass
class _Run:
    """One run in its directory: the stages' inputs, outputs and clocks."""

    model: Path
    name: str
    files: dict[str, str]  # of the model, to their SHA-256
    recipe: Recipe
    out: Path
    device: str
    progress: Progress
    writes: bool  # False in all processes but the first
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: tuple[Path, str],
        recipe: Recipe,
        out: Path,
        device: str,
        progress: Progress,
        held: ExitStack,
        *,
        writes: bool,
    ) -> _Run | None:
        """Check that model, recipe and directory go together; None where the artefact is there already.

        The process that writes has the directory to itself until `held` is closed.
        """
        path, name = model
        config = load_config(path)
        family(config)
        check_original(config, name)
        check_plugins(recipe, StreamedModel(path))
        if out.exists() and not out.is_dir():
            raise UPQError(f"{out}: is a file; --out wants a directory")
        finished = (out / MANIFEST).is_file()
        if not finished and not (out / WORK).is_dir() and out.is_dir() and any(p.name != LOCK for p in out.iterdir()):
            raise UPQError(f"{out}: not empty, and no UPQ run is in it; name a new directory")
        if writes and (recipe.export or not finished or (out / WORK).exists()):
            held.enter_context(lock(out / LOCK, progress.note))
            _sweep(out)
        run = cls(path, name, model_digests(path), recipe, out, device, progress, writes)
        if (out / MANIFEST).is_file():
            manifest = read_manifest(out)
            run.check(manifest.model.digest, {}, manifest.recipe)
            return None
        if run.state.is_file():
            found = decode(_State, read_json(run.state, remedy=f"delete {run.work} to begin anew"), str(run.state))
            run.check(found.model, found.files, found.recipe)
            run.seconds = found.seconds
        elif any(path.name not in (WORK, LOCK) for path in out.iterdir()):
            raise UPQError(f"{out}: not empty, and no UPQ run is in it; name a new directory")
        with write_errors(run.work):
            run.work.mkdir(exist_ok=True)
        run.progress.plan(run.costs())
        return run

    @property
    def digest(self) -> str:
        return digest_of(self.files)

    def check(self, digest: str, files: dict[str, str], recipe: dict[str, Any]) -> None:
        """`files`: their digests as the run began, where they are known, to name the one that differs."""
        remedy = "give the same command as before, or another --out"
        if digest != self.digest:
            changed = [name for name in sorted(files.keys() | self.files) if files.get(name) != self.files.get(name)]
            where = ""
            if files:
                sha256 = [of.get(changed[0], "that of no file") for of in (files, self.files)]
                where = f": sha256 of {changed[0]} was {sha256[0]} and is now {sha256[1]}"
            raise UPQError(f"{self.out}: belongs to another model than {self.name}{where}; {remedy}")
        found, given = _flat(_as_of_now(recipe)), _flat(self.recipe.model_dump(mode="json"))
        for key in sorted(found.keys() | given.keys()):
            if f"{key}.".startswith(tuple(f"{free}." for free in _FREE)):
                continue
            if found.get(key) != given.get(key):
                was, now = found.get(key), given.get(key)
                raise UPQError(f"{self.out}: belongs to another recipe: {key} was {was!r} and is now {now!r}; {remedy}")

    @property
    def blocks(self) -> int:
        return int(load_config(self.model).num_hidden_layers)

    @property
    def work(self) -> Path:
        return self.out / WORK

    @property
    def state(self) -> Path:
        """What the run is. Written once the data is ready: until then nothing would be lost by another recipe."""
        return self.work / "run.json"

    @property
    def checkpoint(self) -> Path:
        return self.work / "distill.safetensors"

    def write_state(self) -> None:
        if not self.writes:
            return
        state = {
            "model": self.digest,
            "files": self.files,
            "recipe": self.recipe.model_dump(mode="json"),
            "seconds": self.seconds,
        }
        atomic_write(self.state, json.dumps(state, indent=1))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time within to the stage's clock, which outlives an interruption of the run."""
        before, began = self.seconds.get(stage, 0.0), time.monotonic()
        failed = True
        try:
            yield
            failed = False
        finally:
            give_back()  # the next stage's peak is its own
            self.seconds[stage] = before + time.monotonic() - began
            if self.state.is_file():
                # On a full disk the stage's own error is the one to be shown.
                with suppress(UPQError) if failed else nullcontext():
                    self.write_state()

    def costs(self) -> dict[str, tuple[int, float]]:
        """Units and cost of each stage; the cost counts passes of one token through one block."""
        blocks, recipe = self.blocks, self.recipe
        seq = recipe.data.seq_len
        # Reading text takes no passes; its pace says nothing about the stages after it.
        costs = {"data": (sequences(recipe) + recipe.data.validation, 0.0)}
        if (section := to_be_written(recipe)) is not None:
            assert section.tokens is not None
            # One token at a time: on the reference model 130 µs a block, where a token of a training row takes 15.
            costs = {"generate": (section.tokens, section.tokens * blocks * 8.0)} | costs
        for name, stage in (("int4", recipe.int4), ("int2", recipe.int2)):
            if stage is not None:
                costs[name] = (blocks, blocks * stage.samples * seq * 3.0 + blocks * _method(stage).cost * seq)
        total = steps(recipe.distill, seq)
        taught = LOSSES.get(recipe.distill.loss.name).uses_teacher or recipe.distill.hidden
        passes = 4.0 if taught and not caches_teacher(recipe) else 3.0
        passes += recipe.distill.gradient_checkpointing
        if caches_teacher(recipe):
            rows = min(total * recipe.distill.batch_size, sequences(recipe))
            costs["teacher"] = (rows, rows * seq * blocks * 1.0)
        costs["distill"] = (total, total * recipe.distill.batch_size * seq * blocks * passes)
        costs["check"] = (3, recipe.data.validation * seq * blocks * (2.0 + (recipe.int4 is not None)))
        if recipe.export:
            costs["export"] = (len(recipe.export), 0.0)
        return costs

    def generate(self, section: Generated, processes: Processes) -> None:
        self.progress.start("generate")
        sharded = self.recipe.memory.weights == "sharded" and processes.world > 1
        mesh = make_mesh(torch.device(self.device).type) if sharded else None
        with processes.shared_errors():
            for source in sources_of(self.recipe.data):
                identity(source)  # a file that is not there shows before the model has written for hours
            model = self.original(mesh)
            tokenizer = load_tokenizer(self.model)
        write_conversations(
            self.generated(section),
            model,
            tokenizer,
            section,
            seed=self.recipe.seed,
            progress=self.progress,
            processes=processes,
            sharded=sharded,
        )

    def original(self, mesh: DeviceMesh | None) -> PreTrainedModel:
        """To write conversations with: whole, or cut over the processes of `mesh`."""
        dtype: torch.dtype | Literal["auto"] = torch.float32 if self.device == "cpu" else "auto"
        if mesh is None:
            model = load_model(self.model, dtype=dtype, device=self.device)
            check_finite(model, self.model)
        else:
            model = load_original(StreamedModel(self.model, device=self.device, dtype=dtype), mesh)
            model.generation_config = generation_config(self.model)
        return model

    def generated(self, section: Generated) -> Path:
        """By what it is made of: until run.json is written, another recipe may come to this directory."""
        return self.work / f"generated-{digest(section, self.digest, self.recipe.seed)}"

    def section(self) -> Data:
        """The recipe's data, with what the model wrote as one more source."""
        data, section = self.recipe.data, to_be_written(self.recipe)
        if section is None:
            return data
        written = Source(path=str(self.generated(section)), weight=section.weight)
        return data.model_copy(update={"sources": (*sources_of(data), written), "generated": None})

    def data(self) -> TokenSet:
        self.progress.start("data")
        check_lengths(self.recipe, load_config(self.model))
        path = self.work / "tokens.safetensors"
        data = prepare(
            self.section(),
            load_tokenizer(self.model),
            path,
            sequences=sequences(self.recipe),
            seed=self.recipe.seed,
            progress=self.progress,
        )
        if not len(data.validation_tokens_NT):
            raise UPQError("data: too little text to hold any back for validation; add text or lower data.seq_len")
        seen = self.work / "data.json"
        if seen.is_file() and read_json(seen, remedy=f"delete {self.work} to begin anew") != data.digest:
            raise UPQError(f"{self.out}: the data has changed since this run began; restore it, or use another --out")
        if self.writes:
            atomic_write(seen, json.dumps(data.digest))
            self.write_state()
        return data

    def blockwise(self, name: str, stage: Blockwise, data: TokenSet, processes: Processes) -> None:
        store, model = self.store(name), StreamedModel(self.model, device=self.device, precision=stage.precision)
        self.progress.start(name, done=store.done(len(model)))
        walk(
            model,
            data.calibration(stage.samples),
            _method(stage),
            store,
            source=self.store("int4") if name == "int2" and self.recipe.int4 is not None else None,
            seed=self.recipe.seed,
            progress=self.progress,
            activations=self.activations(),
            processes=processes,
        )

    def store(self, name: str) -> BlockStore:
        stage = self.recipe.int4 if name == "int4" else self.recipe.int2
        assert stage is not None
        return BlockStore(self.work / name, stage.scheme(), latents=name == "int2" and trains_weights(self.recipe))

    def cache(self, data: TokenSet) -> CachedTeacher:
        """Where the teacher's targets are or will be: every row that the training reads, in its order."""
        config = self.recipe.distill
        rows = data.rows(0, steps(config, self.recipe.data.seq_len) * config.batch_size)
        return CachedTeacher(self.work / "teacher", tuple(dict.fromkeys(rows.tolist())))

    def cache_teacher(self, data: TokenSet) -> None:
        config, cache = self.recipe.distill, self.cache(data)
        self.progress.start("teacher", done=cache.rows_done())
        if cache.rows_done() == len(cache.rows):
            return
        vocabulary = int(load_config(self.model).vocab_size)
        size = cache.bytes(config.teacher_top_k, vocabulary, self.recipe.data.seq_len)
        kept = f"the {min(config.teacher_top_k, vocabulary)} likeliest of {vocabulary} tokens"
        self.progress.note(f"teacher: {kept} at each position of {len(cache.rows)} rows, {size / 1e6:,.2f} MB on disk")
        model = StreamedModel(self.model, device=self.device)
        teacher = StreamedTeacher(model, *model.ending())
        write_cache(cache, teacher, data.tokens_NT, config, progress=self.progress)

    def models(self, *, sharded: bool) -> tuple[PreTrainedModel, PreTrainedModel | StreamedTeacher]:
        """Student and teacher before the training: whole, or with no more in memory than stays there."""
        store, config = self.store("int2"), self.recipe.distill
        resident, norms = config.teacher == "resident", config.train_norms
        if resident and not sharded:
            original = load_model(self.model, dtype=torch.float32, device=self.device)
            original.requires_grad_(False)
            check_finite(original, self.model)
            student = make_student(original, self.by_path(store.solutions), train_norms=norms)
            return student, original
        model = StreamedModel(self.model, device=self.device)
        if sharded:
            student, original = load_sharded(model, store.solutions, train_norms=norms, keep=resident)
        else:
            student, original = load_student(model, store.solutions, train_norms=norms)
        if resident:
            return student, original
        return student, StreamedTeacher.of(model, original)

    def by_path(self, of_block: Callable[[int], Mapping[str, T]]) -> dict[str, T]:
        """By module path what `of_block` gives by the names of a block's linears."""
        prefix = family(load_config(self.model)).blocks
        found = ((index, of_block(index)) for index in range(self.blocks))
        return {f"{prefix}.{index}.{name}": value for index, block in found for name, value in block.items()}

    def distill(self, data: TokenSet, stop: Stop, processes: Processes) -> _Trained:
        config = self.recipe.distill
        total = steps(config, self.recipe.data.seq_len)
        if not total:
            return _Trained(self.untrained(), {})
        sharded = self.recipe.memory.weights == "sharded" and processes.world > 1
        student, teacher = self.models(sharded=sharded)
        config = settled(config, teacher, data)
        taught: Teacher = self.cache(data) if caches_teacher(self.recipe) else teacher
        del teacher  # what the student does not share of it goes, unless it is still `taught`
        with stop.held():
            distill(
                student,
                taught,
                data,
                config,
                total_steps=total,
                checkpoint=self.checkpoint,
                progress=self.progress,
                sharded=sharded,
                stop=stop,
            )
        trained = norms(student) if config.train_norms else {}
        extra = {f"{name}.weight": full_tensor(norm_weight(norm).detach()) for name, norm in trained.items()}
        return _Trained(freeze(student, keep=self.writes), extra)

    def untrained(self) -> Codes:
        """As the INT2 stage has left them, read one block at a time."""
        store, prefix = self.store("int2"), family(load_config(self.model)).blocks
        blocks = range(self.blocks if self.writes else 0)
        return Codes((f"{prefix}.{i}.{name}", q) for i in blocks for name, q in store.qtensors(i).items())

    @property
    def made(self) -> Path:
        """Where the artefact lies until it is checked."""
        return self.work / "artifact"

    def write(self, data: TokenSet, trained: _Trained) -> None:
        """The artefact's files: the processor's work, with none of the original's linears in memory."""
        self.progress.start("check")
        manifest = Manifest(
            recipe=self.recipe.model_dump(mode="json"),
            model=SourceModel(path=self.name, digest=self.digest),
            versions={p: version(p) for p in ("upq", "torch", "transformers")} | {"python": platform.python_version()},
            data=[*(asdict(use) for use in data.sources), {"digest": data.digest, "rows": len(data.tokens_NT)}],
        )
        model = StreamedModel(self.model, dtype="auto").without_linears()
        model.generation_config = generation_config(self.model)
        shutil.rmtree(self.made, ignore_errors=True)  # what a killed run left half done
        with write_errors(self.made):
            self.made.mkdir()
        write_artifact(
            self.made,
            model,
            trained.qtensors,
            manifest=manifest,
            tokenizer=load_tokenizer(self.model),
            embeddings_bits=self.recipe.embeddings.bits,
            extra_tensors=trained.norms,
            errors=self.errors(),
        )

    def finish(self, data: TokenSet) -> Manifest:
        """Load the artefact as a user would and measure it against the original, which is read block by block."""
        model, rows_NT = StreamedModel(self.model, device=self.device, dtype="auto"), data.validation_tokens_NT
        with self.activations() as allocate:
            original = streamed(model, rows_NT, allocate=allocate)
            self.progress.advance(1)
            int4 = self.int4_metrics(model, original, data, allocate)
            self.progress.advance(1)
            packed = load(self.made, device=self.device)
            text = self.measured(packed, original, data)
        self.progress.advance(1)
        before = {"ppl": text.teacher_ppl, **_size(model.empty(), self.model)}
        after = {"ppl": text.ppl, "kld": text.kld, "top1": text.top1, **_size(packed, self.made)}
        metrics = {"source": before, **int4, "artifact": after | {"compute": "reference"}}
        skipped = skipped_steps(self.checkpoint) if self.checkpoint.is_file() else []
        return read_manifest(self.made).model_copy(update={"metrics": metrics, "skipped_steps": skipped})

    def activations(self) -> AbstractContextManager[Allocate]:
        return allocator(self.work if self.recipe.memory.activations == "disk" else None)

    def publish(self, manifest: Manifest) -> None:
        """Move the artefact out of the work directory, the manifest last."""
        manifest = manifest.model_copy(update={"seconds": self.seconds, "peak_memory_bytes": peak_memory_bytes()})
        publish(self.made, self.out, manifest)

    def int4_metrics(
        self, model: StreamedModel, original: Streamed, data: TokenSet, allocate: Allocate
    ) -> dict[str, dict[str, Any]]:
        """What the INT4 stage had reached, as a row of its own."""
        if self.recipe.int4 is None:
            return {}
        store, sizes = self.store("int4"), list[tuple[int, int]]()

        def block(index: int) -> nn.Module:
            qtensors = store.qtensors(index)
            for q in qtensors.values():
                weights = q.codes_OI.numel()
                sizes.append((weights, weights * q.scheme.bits + 8 * q.scale_OG.nbytes))
            return with_weights(model.block(index), qtensors)

        states = streamed(model, data.validation_tokens_NT, block=block, allocate=allocate)
        text = self.measured(states, original, data)
        weights, bits = (sum(each) for each in zip(*sizes, strict=True))
        return {"int4": {"ppl": text.ppl, "kld": text.kld, "top1": text.top1, "bits_per_weight": bits / weights}}

    def measured(self, model: PreTrainedModel | Streamed, original: Streamed, data: TokenSet) -> TextMetrics:
        trim()  # its logits are the check's peak; what came before has left 350 MB at width 1024
        with computing("reference"):  # the figures are of the weights, and the same on every machine
            return evaluate_text(model, data.validation_tokens_NT, teacher=original, mask_NT=data.validation_mask_NT)

    def errors(self) -> dict[str, float]:
        """Module path to the relative error of its weights as the INT2 stage left them."""
        return {path: figures["weight"] for path, figures in self.by_path(self.store("int2").report).items()}


def sequences(recipe: Recipe) -> int:
    """Training rows the run can use: its token budget, or the larger calibration set."""
    stages = [stage for stage in (recipe.int4, recipe.int2) if stage is not None]
    budget = steps(recipe.distill, recipe.data.seq_len) * recipe.distill.batch_size
    return max(budget, *(stage.samples for stage in stages))


def to_be_written(recipe: Recipe) -> Generated | None:
    """What the original model writes itself, its tokens always given."""
    section = recipe.data.generated
    if section is None or section.tokens is not None:
        return section
    share = section.weight / (section.weight + sum(source.weight for source in sources_of(recipe.data)))
    read = (sequences(recipe) + recipe.data.validation) * recipe.data.seq_len
    return section.model_copy(update={"tokens": math.ceil(share * read)})


def caches_teacher(recipe: Recipe) -> bool:
    config = recipe.distill
    trains = steps(config, recipe.data.seq_len) > 0
    return trains and config.teacher == "cached" and LOSSES.get(config.loss.name).uses_teacher


def trains_weights(recipe: Recipe) -> bool:
    """Whether latents are learned after the block-wise stage; else its codes are all that is needed of it."""
    return recipe.distill.train_weights and steps(recipe.distill, recipe.data.seq_len) > 0


def with_weights(block: nn.Module, qtensors: dict[str, QTensor]) -> nn.Module:
    """The block itself, its linears holding what the codes say."""
    for name, q in qtensors.items():
        block.get_parameter(f"{name}.weight").data.copy_(q.dequantize())
    return block


def _size(model: PreTrainedModel, path: Path) -> dict[str, Any]:
    """Keys as in `upq eval --json`."""
    return {"bits_per_weight": model_size(model).bits_per_weight, "bytes": weights_bytes(path)}


def _method(stage: Blockwise) -> Method:
    cls = METHODS.get(stage.method.name)
    return cls(stage.method.options(cls.Config, f"method {stage.method.name}"))


def check_original(config: PretrainedConfig, name: str) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UPQError(f"{name}: already quantised; give the original FP16, BF16 or FP32 model")


def check_lengths(recipe: Recipe, config: PretrainedConfig) -> None:
    """UPQError for rows that the model cannot read, and for a token budget below one step."""
    seq_len, limit = recipe.data.seq_len, getattr(config, "max_position_embeddings", recipe.data.seq_len)
    if seq_len > limit:
        raise UPQError(f"data.seq_len={seq_len} is more than the model's {limit}; lower it")
    if steps(recipe.distill, seq_len) == 0 and recipe.distill.tokens > 0:
        step = recipe.distill.batch_size * seq_len
        raise UPQError(f"distill.tokens={recipe.distill.tokens} is less than one step of {step} tokens")


def check_plugins(recipe: Recipe, model: StreamedModel) -> None:
    """Decode every plug-in's options and try every group size now, so that a typo shows before hours of work."""
    for stage in (recipe.int4, recipe.int2):
        if stage is not None:
            _method(stage)
            for linear in model.spec.linears:
                stage.scheme().groups(model.in_features(linear))
    for plugin in recipe.export:
        exporter(plugin.name, plugin.model_extra)
    check_teacher(recipe.distill)
    check_optimizer(recipe.distill)
    loss = LOSSES.get(recipe.distill.loss.name)
    recipe.distill.loss.options(loss.Config, f"distill.loss {recipe.distill.loss.name}")


def _local(model: str | Path) -> tuple[Path, str]:
    """The model's files on this machine, and the name it was asked for by."""
    if Path(model).is_dir():
        return Path(model), str(model)
    load_config(model)  # its errors are clearer than the hub's
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "merges.txt", "vocab.*"]
    return Path(snapshot_download(str(model), allow_patterns=patterns)), str(model)


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UPQError(f"device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    return device


def _sweep(out: Path) -> None:
    """Remove what killed writers left half done. With the lock held, nobody is at work on any of it."""
    for path in [*(out / WORK).rglob(".*"), *(out / "exports").glob(".*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may have gone with its directory


def _as_of_now(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an earlier version wrote, with the defaults of keys that have come since: they change no result."""
    try:
        return Recipe.model_validate(recipe).model_dump(mode="json")
    except ValidationError:  # of a key that has gone since
        return recipe


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}

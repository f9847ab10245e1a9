"""The runner: the stages of a recipe one after the other, each taking up what is on disk and doing the rest.

It does not know what a stage does. See `upq.run.directory` for what lies where, `upq.run.frame` for what surrounds the
stages.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig

from upq.artifact.manifest import Manifest, read_manifest
from upq.core.errors import UPQError
from upq.core.memory import trim
from upq.core.precision import cpu_dtype
from upq.core.processes import Processes
from upq.core.progress import Progress, Silent
from upq.core.signals import Stop
from upq.data.sources import sources_of
from upq.data.tokens import TokenSet
from upq.exports import exporter
from upq.files.digests import model_digests
from upq.files.lock import lock
from upq.files.metrics import METRICS, Metrics, read_metrics
from upq.model.coverage import coverage
from upq.model.loading import context_of, load_config, load_tokenizer
from upq.model.source import Source
from upq.run.directory import LOCK, CpuType, Keep, Place, RunDirectory, sweep
from upq.run.dry import check_text
from upq.run.frame import Frame, export
from upq.run.recipe import Recipe
from upq.run.tracking import Tracking, check_trackers
from upq.stages import Job, ModelState, Reading, Stage

_LARGE = 2_000_000_000  # bytes: from here on checksums take seconds
_FIRST_PROCESS_TIMEOUT = timedelta(days=30)  # other processes wait that long for what the first one does alone


def quantize(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "auto",
    keep_work: bool = False,
    redo: bool = False,
    work: str | Path | None = None,
    allow_partial: bool = False,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Manifest:
    """Quantise a Hugging Face causal LM (directory or hub id) into the directory `out`, or go on where a run stopped.

    Stages whose settings and predecessors are as before are kept. Where others would be thrown away, UPQError says
    which and what they cost; `redo` agrees. Runs that share `work` keep their stages there, each under its digest, and
    take one another's. `allow_partial`: less than 90 % of the decoder's weights may become codes.

    Under torchrun all processes take part in every stage; the rest is the first one's.

    Raises UPQError, with nothing changed, where `out` holds something else: another model, recipe or data, or where
    another process is at work in it. `stop` ends a training after a step, its state saved, by raising Stopped.
    """
    device = _device(device)
    state = PartialState(cpu=device == "cpu", timeout=_FIRST_PROCESS_TIMEOUT)
    device = str(state.device) if device == "cuda" else device  # a GPU for each process
    progress = (progress or Silent()) if state.is_main_process else Silent()
    processes = Processes(state.process_index, state.num_processes, device)
    path, name = _local(model)
    if (size := sum(file.stat().st_size for file in path.glob("*.safetensors"))) > _LARGE:
        progress.note(f"{name}: reading its {size / 1e9:.0f} GB, for its checksums")
    directory = RunDirectory(
        Path(out), None if work is None else Path(work), name, model_digests(path), recipe, processes.first, _on_cpu()
    )
    reading = reading_of(recipe)
    with ExitStack() as held:
        with state.main_process_first():  # the others then find the directory as it has left it
            config, tokenizer, source = load_config(path), load_tokenizer(path), Source(path)
            check(config, recipe, source, name)
            covered = coverage(source.outline)
            covered.check(name, allow_partial=allow_partial)
            # Data sets of the hub cost seconds. Where rows come first, what is wrong with them shows at once anyway.
            hub = not next(iter(recipe.stages.values())).demands(recipe.data).rows
            check_text(path, config, tokenizer, recipe, name, hub=hub)
            if not directory.open(progress, held, redo=redo):
                progress.note(f"{out} is finished already: nothing to do")
                if recipe.export:
                    progress.plan({"export": (len(recipe.export), 1.0)})
                if processes.first:
                    if not keep_work:  # a run that was killed in its last moments has left it
                        shutil.rmtree(directory.work, ignore_errors=True)
                    export(recipe.export, directory.out, progress)
                return read_manifest(directory.out)
        progress.plan(costs(recipe, reading, len(source)))
        progress.note(covered.text(recipe.bits))
        frame = Frame(directory, path, tokenizer, device, reading, progress)
        with processes.shared_errors():
            tracked = recipe.track if processes.first else ()
            tracking = Tracking(tracked, recipe.name, directory.out, recipe.settings(), progress.note)
            held.callback(tracking.finish)
        run = _Run(frame, state, processes, stop or Stop(), tracking)
        solved = run.stages()
        if processes.first:
            with directory.timed("check"):
                frame.pack(run.rows(solved), solved)
                trim()  # after packing, 240 MB at width 1024
                manifest = frame.check(run.rows(solved), solved)
            frame.publish(manifest)
            for name, figures in manifest.metrics.items():
                tracking.figures(name, figures)
            if not keep_work:
                shutil.rmtree(directory.work)
            export(recipe.export, directory.out, progress)
        state.wait_for_everyone()
    return read_manifest(directory.out)


class _Run:
    """One call of the runner: goes through the stages with the state that passes from each to the next."""

    def __init__(
        self, frame: Frame, accelerate: PartialState, processes: Processes, stop: Stop, tracking: Tracking
    ) -> None:
        self.frame, self.processes, self.stop, self.tracking = frame, processes, stop, tracking
        self._accelerate = accelerate
        self._packed: tuple[ModelState, TokenSet] | None = None

    def stages(self) -> ModelState:
        """The state after the last stage."""
        run, state = self.frame.run, ModelState(digest="")
        for name, place in run.places().items():
            with self._alone_in(place):
                state = self._stage(place, run.recipe.stages[name], state)
        return state

    def _stage(self, place: Place, stage: Stage, state: ModelState) -> ModelState:
        run, processes, name = self.frame.run, self.processes, place.name
        with self._accelerate.main_process_first():
            done = place.state() if not place.holds_other_work() else None
            if done is not None:
                if run.shared is not None:
                    self.frame.progress.note(f"{name}: taken from {place.folder}")
                    run.seconds[name] = place.seconds()
                for line in read_metrics(place.folder / METRICS) if processes.first else ():
                    self.tracking.line(line)
                return done
        if stage.demands(run.recipe.data).rows:
            self.rows(state)
        with processes.shared_errors():
            begun = place.begin(run.cpu_dtype) if processes.first else None
            run.write_record()
        keep = processes.of_first(begun is not None and begun.keep == "latents")
        bf16 = processes.of_first(begun is not None and begun.cpu_dtype == "bfloat16")
        job = self._job(place, "latents" if keep else "codes", torch.bfloat16 if bf16 else torch.float32, state)
        with run.timed(name):
            state = replace(stage.run(job, state), digest=place.digest)
        with processes.shared_errors():
            if processes.first:
                place.finish(state, run.seconds[name])
        return state

    @contextmanager
    def _alone_in(self, place: Place) -> Iterator[None]:
        """Nobody else works in a folder that several runs share."""
        with ExitStack() as held:
            with self.processes.shared_errors():
                if self.frame.run.shared is not None and self.processes.first:
                    held.enter_context(lock(place.folder / LOCK, self.frame.progress.note))
                    sweep(place.folder)
            yield

    def _job(self, place: Place, keep: Keep, cpu_dtype: torch.dtype, state: ModelState) -> Job:
        frame = self.frame
        return Job(
            name=place.name,
            folder=place.folder,
            model=state.model or frame.model,
            seed=frame.recipe.seed,
            device=frame.device,
            processes=self.processes,
            progress=frame.progress,
            stop=self.stop,
            memory=frame.recipe.memory,
            keep=keep,
            cpu_dtype=cpu_dtype,
            data=frame.recipe.data,
            reading=frame.reading,
            rows=lambda: self.rows(state),
            metrics=Metrics(place.folder / METRICS if self.processes.first else None, place.name, self.tracking.line),
        )

    def rows(self, state: ModelState) -> TokenSet:
        """The packed text, packed anew where a stage has written some since."""
        if self._packed is None or self._packed[0].text != state.text:
            with self._accelerate.main_process_first(), self.frame.run.timed("data"):  # the others find it on disk
                self._packed = state, self.frame.rows(state)
        return self._packed[1]


def check(config: PretrainedConfig, recipe: Recipe, model: Source, name: str) -> None:
    """Every fault of model and recipe that shows without data, so that a typo shows before hours of work."""
    if getattr(config, "quantization_config", None) is not None:
        raise UPQError(f"{name}: already quantised; give the original FP16, BF16 or FP32 model")
    seq_len, limit = recipe.data.seq_len, context_of(config)
    if limit is not None and seq_len > limit:
        raise UPQError(f"data.seq_len={seq_len} is more than the model's {limit}; lower it")
    solved = ""  # the last stage that solved blocks
    codes_alone, widths = "", False  # the stage that has left no weights to train, and whether one chose widths
    for stage_name, stage in recipe.stages.items():
        stage.check(stage_name, model, recipe.data)
        if stage.transforms and solved:
            raise UPQError(f"{stage_name} changes weights that {solved} before it has solved; put it first")
        solved = stage_name if stage.solves else solved
        demands = stage.demands(recipe.data)
        if demands.start == "latents" and codes_alone:
            raise UPQError(
                f"{stage_name} trains weights, and {codes_alone} before it leaves codes alone; set"
                f" {stage_name}.train_weights=false, or change their order"
            )
        if demands.widths and not widths:
            raise UPQError(f"{stage_name}.mixed: no stage before it chooses widths; put one of the kind `widths` there")
        widths = widths or stage.chooses_widths
        if stage.solves or stage.trains:
            codes_alone = stage_name if demands.codes_alone else codes_alone if not stage.solves else ""
    for plugin in recipe.export:
        exporter(plugin.name, plugin.model_extra)
    check_trackers(recipe.track)


def reading_of(recipe: Recipe) -> Reading:
    """The text that a run of `recipe` reads: as many rows as the stage that asks for most."""
    data = recipe.data
    rows = max(stage.demands(data).rows for stage in recipe.stages.values())
    return Reading(data.seq_len, rows, data.validation, sum(source.weight for source in sources_of(data)))


def costs(recipe: Recipe, reading: Reading, blocks: int) -> dict[str, tuple[int, float]]:
    """By label of the progress bar, in order: units and cost (passes of one token through one block)."""
    found, data = dict[str, tuple[int, float]](), (reading.rows + reading.validation, 0.0)
    for name, stage in recipe.stages.items():
        if stage.demands(recipe.data).rows and "data" not in found:
            found["data"] = data  # reading text takes no passes; its pace says nothing about the stages after it
        found |= stage.cost(name, blocks, reading)
    found.setdefault("data", data)
    measured = sum(stage.solves for stage in recipe.stages.values()) - 1
    found["check"] = (3, reading.validation * reading.seq_len * blocks * (2.0 + measured))
    return found | ({"export": (len(recipe.export), 0.0)} if recipe.export else {})


def _local(model: str | Path) -> tuple[Path, str]:
    """The model's files on this machine, and the name it was asked for by."""
    if (path := Path(model)).is_dir():
        return path, str(model) if path.name not in ("", "..") else path.resolve().name
    load_config(model)  # its errors are clearer than the hub's
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "merges.txt", "vocab.*"]
    return Path(snapshot_download(str(model), allow_patterns=patterns)), str(model)


def _on_cpu() -> CpuType:
    return "bfloat16" if cpu_dtype() == torch.bfloat16 else "float32"


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UPQError(f"device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    return device

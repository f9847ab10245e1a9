"""What every run does around its stages: pack the text, pack the artefact, check it, publish it, export it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.artifact.manifest import Manifest, SourceModel, read_manifest
from upq.artifact.publish import publish
from upq.artifact.size import model_size, weights_bytes
from upq.artifact.transformers import load, write_artifact
from upq.blockwise import BlockStore
from upq.core.config import Plugin
from upq.core.errors import UPQError
from upq.core.memory import peak_memory_bytes, trim
from upq.core.precision import compute_dtype, dtype_name
from upq.core.progress import Progress
from upq.core.scheme import QTensor
from upq.data.packing import prepare
from upq.data.sources import sources_of
from upq.data.tokens import TokenSet
from upq.evals.text import ByToken, NotFinite, Streamed, TextMetrics, evaluate_text, streamed
from upq.exports import ensure_export
from upq.files.metrics import METRICS, read_metrics, write_metrics
from upq.files.tensors import load_tensors
from upq.kernels import computing
from upq.model.activations import Allocate, allocator
from upq.model.coverage import coverage
from upq.model.loading import embedding_rows, generation_config, load_config
from upq.model.source import Source
from upq.nn.activations import attach_inputs
from upq.nn.kv import attach_kv
from upq.nn.packed import Codes
from upq.run.directory import RunDirectory
from upq.run.recipe import Recipe
from upq.stages import ModelState, Reading
from upq.text.tokenizer import check_tokens


@dataclass(frozen=True)
class Frame:
    """The steps of one run that no recipe orders. `model` is the original's directory."""

    run: RunDirectory
    model: Path
    tokenizer: PreTrainedTokenizerBase
    device: str
    reading: Reading
    progress: Progress

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def staging(self) -> Path:
        """Where the artefact lies until it is checked."""
        return self.run.work / "artifact"

    def rows(self, state: ModelState) -> TokenSet:
        """The text packed into rows: the recipe's sources and what stages have written."""
        section = self.recipe.data
        if state.text:
            section = section.model_copy(update={"sources": (*sources_of(section), *state.text)})
        self.progress.start("data")
        data = prepare(
            section,
            self.tokenizer,
            self.run.work / "tokens.safetensors",
            sequences=self.reading.rows,
            seed=self.recipe.seed,
            progress=self.progress,
        )
        for tokens_NT in (data.tokens_NT, data.validation_tokens_NT):
            largest = [int(tokens_NT.max())] if len(tokens_NT) else []
            check_tokens(self.tokenizer, largest, embedding_rows(load_config(self.model)), "data")
        if not len(data.validation_tokens_NT):
            raise UPQError("data: too little text to hold any back for validation; add text or lower data.seq_len")
        return data

    def pack(self, data: TokenSet, state: ModelState) -> None:
        """The artefact's files: the processor's work, with none of the original's linears in memory."""
        store = state.solved
        assert store is not None
        self.progress.start("check")
        source, reports = Source(state.model or self.model, dtype="auto"), dict(self._by_path(store.report))
        manifest = Manifest(
            recipe=self.recipe.model_dump(mode="json"),
            model=SourceModel(path=self.run.name, digest=self.run.model_digest),
            versions={p: version(p) for p in ("upq", "torch", "transformers")} | {"python": platform.python_version()},
            data=[*(asdict(use) for use in data.sources), {"digest": data.digest, "rows": len(data.tokens_NT)}],
            skipped_steps=list(state.skipped_steps),
            transforms=[line for name, stage in self.recipe.stages.items() if (line := stage.line(name)) is not None],
            answers={name: dict(figures) for name, figures in state.answers.items()},
            coverage=coverage(source.outline).text(self.recipe.bits),
            massive={index: found for index in range(len(source)) if (found := store.massive(index)) is not None},
        )
        model = source.without_matrices()
        if not (self.model / "generation_config.json").is_file():  # which is copied; older models say it in config.json
            model.generation_config = generation_config(self.model)
        shutil.rmtree(self.staging, ignore_errors=True)  # of a run that was killed before its end
        write_artifact(
            self.staging,
            model,
            Codes(self._by_path(store.qtensors)),
            manifest=manifest,
            tokenizer=self.tokenizer,
            source=self.model,
            embeddings_bits=self.recipe.embeddings.bits,
            extra_tensors={} if state.norms is None else load_tensors(state.norms)[0],
            errors={path: figures["weight"] for path, figures in reports.items()},
            activations=store.activations,
            input_scales=dict(self._by_path(store.input_scales)),
            kv=store.kv,
            unreached={path: figures["unreached"] for path, figures in reports.items() if "unreached" in figures},
        )

    def check(self, data: TokenSet, state: ModelState) -> Manifest:
        """Load the artefact and measure it against the original, which is read block by block."""
        own, on_cpu = Source(self.model, dtype="auto").dtype, getattr(torch, self.run.cpu_dtype)
        dtype = compute_dtype(own, torch.device(self.device), on_cpu)
        try:
            metrics = self._metrics(data, state, dtype)
        except NotFinite:
            if dtype != torch.float16:
                raise
            self.progress.note("check: the model overflows in float16; it is computed in float32")
            self.progress.start("check")
            metrics = self._metrics(data, state, torch.float32)
        return read_manifest(self.staging).model_copy(update={"metrics": metrics})

    def _metrics(self, data: TokenSet, state: ModelState, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
        """Figures of original and artefact, and of what later stages built upon, computed in `dtype`."""
        model, rows_NT = Source(self.model, device=self.device, dtype=dtype), data.validation_tokens_NT
        with allocator(self.run.work if self.recipe.memory.activations == "disk" else None) as allocate:
            original = streamed(model, rows_NT, allocate=allocate)
            built_of = model if state.model is None else Source(state.model, device=self.device, dtype=dtype)
            self.progress.advance(1)
            before = {}
            for store in state.built_on:
                before[store.folder.name.partition("-")[0]] = self._built_on(store, built_of, original, data, allocate)
            self.progress.advance(1)
            packed = load(self.staging, device=self.device)
            size = _size(packed, self.staging)
            packed.to(dtype)  # type: ignore[arg-type]
            by_token = ByToken(rows_NT)
            text = self._measured(packed, original, data, by_token)
        self.progress.advance(1)
        self._write_metrics(by_token)
        source = {
            "ppl": text.teacher_ppl,
            "ppl_stderr": text.teacher_ppl_stderr,
            **_size(Source(self.model, dtype="auto").empty(), self.model),
        }
        models = {"source": source, **before, "artifact": {**_figures(text), **size, "compute": "reference"}}
        return {name: {**figures, "dtype": dtype_name(dtype)} for name, figures in models.items()}

    def publish(self, manifest: Manifest) -> None:
        """Move the artefact out of the work directory, the manifest last."""
        manifest = manifest.model_copy(update={"seconds": self.run.seconds, "peak_memory_bytes": peak_memory_bytes()})
        clocks = [
            {
                "kind": "stage",
                "stage": name,
                "seconds": seconds,
                "peak_memory_bytes": self.run.peak_memory_bytes.get(name),
            }
            for name, seconds in self.run.seconds.items()
        ]
        write_metrics(self.staging / METRICS, [*read_metrics(self.staging / METRICS), *clocks])
        publish(self.staging, self.run.out, manifest)

    def _write_metrics(self, by_token: ByToken) -> None:
        """What the stages have written, and how far the artefact is from the original, into the artefact."""
        lines = [line for place in self.run.places().values() for line in read_metrics(place.folder / METRICS)]
        checked = [{"kind": "position", "stage": "check", **each} for each in by_token.by_position()]
        write_metrics(self.staging / METRICS, [*lines, *checked])

    def _built_on(
        self, store: BlockStore, model: Source, original: Streamed, data: TokenSet, allocate: Allocate
    ) -> dict[str, Any]:
        """What a block-wise stage had reached that a later one built upon, as a row of its own."""
        sizes = list[tuple[int, int]]()

        def block(index: int) -> nn.Module:
            qtensors = store.qtensors(index)
            for q in qtensors.values():
                weights = q.codes_OI.numel()
                sizes.append((weights, weights * q.scheme.bits + 8 * q.scale_OG.nbytes))
            found = with_weights(model, index, qtensors)
            attach_inputs(found, qtensors, store.activations, store.input_scales(index))
            attach_kv(found, store.kv)
            return found

        states = streamed(model, data.validation_tokens_NT, block=block, allocate=allocate)
        text = self._measured(states, original, data)
        weights, bits = (sum(each) for each in zip(*sizes, strict=True))
        return {**_figures(text), "bits_per_weight": bits / weights}

    def _measured(
        self, model: PreTrainedModel | Streamed, original: Streamed, data: TokenSet, keep: ByToken | None = None
    ) -> TextMetrics:
        trim()  # its logits are the check's peak; what came before has left 350 MB at width 1024
        with computing("reference"):  # the figures are of the weights, and the same on every machine
            mask_NT = data.validation_mask_NT
            return evaluate_text(model, data.validation_tokens_NT, teacher=original, mask_NT=mask_NT, keep=keep)

    def _by_path(self, of_block: Callable[[int], Any]) -> Any:
        """Module path and what `of_block` gives by the names of a block's linears, read one block at a time."""
        model = Source(self.model)
        for index in range(len(model)):
            yield from ((model.path_of(index, name), value) for name, value in of_block(index).items())


def export(exports: tuple[Plugin, ...], out: Path, progress: Progress) -> None:
    """Every export that is not there yet, below `out/exports`. One that fails stops neither the others nor the run."""
    if not exports:
        return
    progress.start("export")
    failed = []
    for plugin in exports:
        try:
            ensure_export(out, plugin.name, options=plugin.model_extra, progress=progress)
        except UPQError as error:
            failed.append(f"{plugin.name} ({error})")
        progress.advance(1)
    if failed:
        raise UPQError(f"{out} is finished, but not its export {', '.join(failed)}; mend it and run the command again")


def with_weights(model: Source, index: int, qtensors: dict[str, QTensor]) -> nn.Module:
    """Block `index`, its weights holding what the codes say."""
    block = model.block(index)
    for matrix in model.matrices(index):
        if matrix.name in qtensors:
            matrix.write(block, qtensors[matrix.name].dequantize())
    return block


def _figures(text: TextMetrics) -> dict[str, Any]:
    """Keys as in `upq eval --json`."""
    measures = ("ppl", "ppl_stderr", "kld", "kld_stderr", "top1", "top1_stderr", "tokens")
    return {name: value for name in measures if (value := getattr(text, name)) is not None}


def _size(model: PreTrainedModel, path: Path) -> dict[str, Any]:
    return {"bits_per_weight": model_size(model).bits_per_weight, "bytes": weights_bytes(path)}

"""An artefact as exporters see it: one dense model's weights by name, on disk until a part of one is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from upq import kernels
from upq.artifact.manifest import Manifest, read_manifest, verify
from upq.artifact.transformers import empty_model
from upq.core.act_scheme import ActScheme
from upq.core.bounded import read_json
from upq.core.errors import UPQError
from upq.core.scales import REAL_SCALES
from upq.core.scheme import QTensor, QuantScheme
from upq.files.tensors import load_rows, tensor_shapes
from upq.grids import GRIDS
from upq.model.layout import Layout, fused_name, layout_of
from upq.model.loading import load_tokenizer
from upq.nn.blocks import model_weights
from upq.nn.experts import PackedExperts
from upq.nn.packed import PackedEmbedding, PackedLinear

# Linears whose biases vLLM's and SGLang's classes read, by family. Other biases they pass over.
_VLLM_BIASED = {"qwen2": ("q_proj", "k_proj", "v_proj"), "qwen3": ("q_proj", "k_proj", "v_proj")}
_CHUNK = 1 << 22  # weights handled at one time: 16 MB in float32

Form = Literal["linear", "expert", "stacked", "transposed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A weight by its name in the checkpoint that an export writes. `scheme` is None where it is not quantised.

    A quantised weight is one tall matrix, also where a checkpoint holds it otherwise (`dense`). It may be a part of
    what the artefact stores: one expert, or the gates of all. The methods read rows [start, stop) of it and nothing
    else.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # as it is computed with: that of the model
    scheme: QuantScheme | None
    files: Mapping[str, Path]  # of every tensor of the artefact
    stored: str = ""  # its name in the artefact, where that is another
    rows: tuple[range, ...] | None = None  # of the stored matrix, in this order; None: all
    every: slice | None = None  # of the stored columns, where it is not quantised
    stacked: int = 1  # rows of the stored matrix in one entry of the stored tensor
    dense: tuple[int, ...] | None = None  # the shape that a checkpoint holds a quantised weight in; None: `shape`
    inputs: int = -1  # the axis of `dense` that is multiplied
    expert: bool = False  # of one expert
    shift: float = 0.0  # what the engine wants added

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def origin(self) -> str:
        """Its name in the artefact."""
        return self.stored or self.name

    @property
    def form(self) -> Form:
        """How a checkpoint holds a quantised weight."""
        if self.dense is not None and len(self.dense) > 2:
            return "stacked"
        if self.dense is not None and self.inputs != -1:
            return "transposed"
        return "expert" if self.expert else "linear"

    def tall(self, tensor: Tensor) -> Tensor:
        """Rows of the matrix, of entries of the tensor that a checkpoint holds."""
        return tensor.movedim(self.inputs, -1).flatten(0, -2)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the weight, each at most 4 million weights (or one row)."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, _CHUNK * rows // max(1, self.numel))
        return ((start, min(rows, start + step)) for start in range(0, rows, step))

    def scale_zero(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Scales as stored and zero points in float32, both (O, G). Of plain weights alone (Exporter.holds)."""
        assert self.scheme is not None
        assert plain(self.scheme)
        zero = GRIDS.get(self.scheme.grid).zero(self.scheme)
        scale_OG = self._stored("_scale", start, stop)
        if zero is not None:
            return scale_OG, torch.full(scale_OG.shape, zero)
        return scale_OG, self._stored("_zero", start, stop).float()

    def outer(self, start: int = 0, stop: int | None = None) -> Tensor | None:
        """What all scales of a row are multiplied with, float32 (O, 1), where their type has that."""
        assert self.scheme is not None
        if self.scheme.scale.outer is None:
            return None
        name = f"{self.origin}_outer"
        if self.scheme.scale.outer == "row":
            return self._stored("_outer", start, stop).float()
        rows = len(range(*slice(start, stop).indices(self.shape[0])))
        return load_rows(self.files[name], name, 0, 1).float().expand(rows, 1)

    def qtensor(self, start: int = 0, stop: int | None = None) -> QTensor:
        assert self.scheme is not None
        codes_OI = kernels.unpack(self._stored("_packed", start, stop), self.scheme.bits, self.shape[1])
        grid, scale_OG = GRIDS.get(self.scheme.grid), self._stored("_scale", start, stop)
        beside = {name: self._stored(f"_{name}", start, stop) for name in grid.beside(self.scheme)}
        beside |= {name: self._whole(f"_{name}") for name in grid.of_matrix(self.scheme)}
        levels = grid.load_levels(beside, scale_OG, self.scheme)
        return QTensor(codes_OI, scale_OG, levels, self.scheme, self.outer(start, stop))

    def tensor(self, start: int = 0, stop: int | None = None) -> Tensor:
        """A weight that is not quantised, as stored."""
        assert self.scheme is None
        if self.rows is None:
            return self._stored("", start, stop)
        stop = self.shape[0] if stop is None else stop
        if self.every is not None and len(self.shape) == 1:  # a part of a row
            return self._stored("", 0, None)[..., self.every].flatten()[start:stop]
        each = sum(map(len, self.rows)) // self.shape[0]
        found = self._stored("", start * each, stop * each)
        return (found if self.every is None else found[..., self.every]).reshape(stop - start, *self.shape[1:])

    def dequantize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """What the weight stands for, exactly, in float32; with `shift`, as an engine adds it in float32."""
        if self.scheme is None:
            exact = self.tensor(start, stop).float()
            return exact + self.shift if self.shift else exact
        return self.qtensor(start, stop).dequantize()

    def _whole(self, suffix: str) -> Tensor:
        """A tensor that belongs to the stored matrix, whatever rows of it the weight is."""
        return load_rows(self.files[self.origin + suffix], self.origin + suffix, 0, None)

    def _stored(self, suffix: str, start: int, stop: int | None) -> Tensor:
        name = self.origin + suffix
        if self.rows is None:
            return load_rows(self.files[name], name, start, stop)
        return torch.cat([self._run(name, run) for run in _cut(self.rows, start, stop)])

    def _run(self, name: str, run: range) -> Tensor:
        first, last = run[0] // self.stacked, run[-1] // self.stacked + 1
        found = load_rows(self.files[name], name, first, last)
        found = found.flatten(0, -2) if found.dim() > 1 else found
        skipped = first * self.stacked
        return found[run[0] - skipped : run[-1] + 1 - skipped : run.step]


def _cut(runs: Sequence[range], start: int, stop: int | None) -> Iterator[range]:
    """Entries [start, stop) of the runs, one after the other."""
    for run in runs:
        part = run[start : len(run) if stop is None else max(0, min(stop, len(run)))]
        if part:
            yield part
        start, stop = max(0, start - len(run)), None if stop is None else stop - len(run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An artefact whose files have been compared with their digests in upq.json."""

    path: Path
    manifest: Manifest
    config: PretrainedConfig  # without quantization_config
    layout: Layout
    dtype: torch.dtype
    model: PreTrainedModel  # without memory, packed modules in place
    weights: dict[str, Weight]  # by name, in the order of the model; of tied ones the embedding alone
    linears: frozenset[str]  # names of the weights that multiply in the decoder blocks
    activations: ActScheme | None = None  # how the artefact rounds their inputs
    kv: ActScheme | None = None  # and keys and values

    @classmethod
    def open(cls, path: Path) -> Source:
        manifest = read_manifest(path)
        verify(path, manifest)
        shards = [path / name for name in manifest.files if name.endswith(".safetensors")]
        model, quantization = empty_model(path, shards)
        schemes = quantization.schemes(model)
        files = {name: shard for shard in shards for name in tensor_shapes(shard)}
        dtype = model.config.dtype
        if not isinstance(dtype, torch.dtype):  # not said
            dtype = _dtype(files)
        weights: dict[str, Weight] = {}
        for name, tensor in model.state_dict().items():
            module, _, kind = name.rpartition(".")
            beside = kind.startswith("weight_") and kind != "weight_packed" and f"{module}.weight_packed" in files
            if name not in files or beside:
                continue  # the second name of tied weights, and what belongs to weight_packed
            if kind == "weight_packed":
                weight = _packed(model.get_submodule(module), module, dtype, schemes[module], files)
            else:
                weight = Weight(name=name, shape=tuple(tensor.shape), dtype=dtype, scheme=None, files=files)
            weights[weight.name] = weight
        matrices = model_weights(model)
        return cls(
            path=path,
            manifest=manifest,
            config=model.config,
            layout=layout_of(model),
            dtype=dtype,
            model=model,
            weights=weights,
            linears=frozenset(name for name in weights if {name, name.removesuffix(".weight")} & matrices.keys()),
            activations=quantization.activations,
            kv=quantization.kv,
        )

    @property
    def name(self) -> str:
        """What the model was called: the last part of its source's path."""
        return self.manifest.model.name

    @property
    def tied(self) -> bool:
        return self.of_module(self.layout.head) is None

    def of_module(self, path: str) -> Weight | None:
        """The weight of a module of the model, whatever it is called in the checkpoint."""
        return next((weight for weight in self.weights.values() if weight.origin == f"{path}.weight"), None)

    def biases_beyond(self, places: Mapping[str, tuple[str, ...] | None]) -> list[str]:
        """Biases without a place in an engine: `places` has the linears with one, for families where not all have."""
        known = places.get(self.config.model_type)
        biases = [name for name in self.weights if name.endswith(".bias")]
        return [] if known is None else [name for name in biases if name.split(".")[-2] not in known]

    def vllm_notes(self) -> tuple[str, ...]:
        """What vLLM and SGLang would leave out without a word."""
        lost = self.biases_beyond(_VLLM_BIASED)
        return (f"vLLM and SGLang leave out {lost[0]}: run it with transformers",) if lost else ()

    def packs(self, weight: Weight) -> bool:
        """Whether it is a quantised linear of the blocks: what most engines have packed products for."""
        return weight.scheme is not None and weight.name in self.linears

    def fused(self, paths: Iterable[str]) -> set[str]:
        """What vLLM and SGLang call these linears where they keep several in one module, and know no other name."""
        return {fused for path in paths if (fused := fused_name(path)) is not None}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path)

    def ends(self) -> list[int]:
        """The ids on which the model stops, as transformers' generate reads them."""
        file = self.path / "generation_config.json"
        remedy = "correct it or leave it out"
        settings = read_json(file, remedy=remedy) if file.is_file() else {}
        if not isinstance(settings, dict):
            raise UPQError(f"{file}: expected an object, got {type(settings).__name__}; {remedy}")
        found = settings.get("eos_token_id", self.config.eos_token_id)
        ends = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(end) is int for end in ends):
            raise UPQError(f"{file}: eos_token_id is {found!r}, not one or more token ids; {remedy}")
        return ends

    def companions(self) -> list[Path]:
        """Files that every Hugging Face directory of this model has: tokenizer, chat template, generation settings."""
        return [
            self.path / name
            for name in self.manifest.files
            if name != "config.json" and not name.endswith((".safetensors", ".safetensors.index.json"))
        ]


def plain(scheme: QuantScheme) -> bool:
    """Evenly spaced levels, and scales of a usual type: what most engines have in one form or another."""
    return GRIDS.get(scheme.grid).uniform and scheme.scale_dtype in REAL_SCALES


def _packed(layer: nn.Module, path: str, dtype: torch.dtype, scheme: QuantScheme, files: Mapping[str, Path]) -> Weight:
    assert isinstance(layer, PackedLinear | PackedExperts | PackedEmbedding)
    name, dense, inputs = f"{path}.weight", None, -1
    if isinstance(layer, PackedExperts):
        name, dense = path, layer.matrix.parameter_shape
        inputs = -2 if layer.matrix.transposed else -1
    elif isinstance(layer, PackedLinear) and layer.transposed:
        dense, inputs = (layer.columns, layer.rows), -2
    return Weight(
        name=name,
        shape=(layer.rows, layer.columns),
        dtype=dtype,
        scheme=scheme,
        files=files,
        stored="" if name == f"{path}.weight" else f"{path}.weight",
        dense=dense,
        inputs=inputs,
    )


def _dtype(files: Mapping[str, Path]) -> torch.dtype:
    """Of the norms and all else that is not packed."""
    name = next(name for name in files if ".weight_" not in name and "norm" in name)
    return load_rows(files[name], name, 0, 1).dtype

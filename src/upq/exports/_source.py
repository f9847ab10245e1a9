"""An artefact as exporters see it: one dense model's weights by name, on disk until a part of one is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from upq import kernels
from upq.artifact.manifest import Manifest, read_manifest, verify
from upq.artifact.transformers import empty_model
from upq.core.bounded import read_json
from upq.core.errors import UPQError
from upq.core.scheme import QTensor, QuantScheme
from upq.files.tensors import load_rows, tensor_shapes
from upq.grids import GRIDS
from upq.model.layout import Layout, layout_of
from upq.model.loading import load_tokenizer
from upq.nn.blocks import model_weights, of_experts
from upq.nn.experts import PackedExperts
from upq.nn.packed import PackedEmbedding, PackedLinear

# Linears whose biases vLLM's and SGLang's classes read, by family. Other biases they pass over.
_VLLM_BIASED = {"qwen2": ("q_proj", "k_proj", "v_proj"), "qwen3": ("q_proj", "k_proj", "v_proj")}
_CHUNK = 1 << 22  # weights handled at one time: 16 MB in float32
_FUSED = {f"{name}_proj": "qkv_proj" for name in "qkv"} | {f"{name}_proj": "gate_up_proj" for name in ("gate", "up")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A weight by its name in the dense checkpoint. `scheme` is None where it is not quantised.

    The methods read rows [start, stop) of it and nothing else.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # as it is computed with: that of the model
    scheme: QuantScheme | None
    files: Mapping[str, Path]  # of every tensor of the artefact

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the weight, each at most 4 million weights (or one row)."""
        rows = self.shape[0]
        step = max(1, _CHUNK * rows // max(1, self.numel))
        return ((start, min(rows, start + step)) for start in range(0, rows, step))

    def scale_zero(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Scales as stored and zero points in float32, both (O, G)."""
        assert self.scheme is not None
        scale_OG = self._stored("_scale", start, stop)
        zero = GRIDS.get(self.scheme.grid).zero(self.scheme)
        if zero is not None:
            return scale_OG, torch.full(scale_OG.shape, zero)
        return scale_OG, self._stored("_zero", start, stop).float()

    def qtensor(self, start: int = 0, stop: int | None = None) -> QTensor:
        assert self.scheme is not None
        codes_OI = kernels.unpack(self._stored("_packed", start, stop), self.scheme.bits, self.shape[1])
        return QTensor(codes_OI, *self.scale_zero(start, stop), self.scheme)

    def tensor(self, start: int = 0, stop: int | None = None) -> Tensor:
        """A weight that is not quantised, as stored."""
        assert self.scheme is None
        return self._stored("", start, stop)

    def dequantize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """What the weight stands for, exactly, in float32."""
        if self.scheme is None:
            return self.tensor(start, stop).float()
        return self.qtensor(start, stop).dequantize()

    def _stored(self, suffix: str, start: int, stop: int | None) -> Tensor:
        name = self.name + suffix
        return load_rows(self.files[name], name, start, stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An artefact whose files have been compared with their digests in upq.json."""

    path: Path
    manifest: Manifest
    config: PretrainedConfig  # without quantization_config
    layout: Layout
    dtype: torch.dtype
    weights: dict[str, Weight]  # by name, in the order of the model; of tied ones the embedding alone
    linears: frozenset[str]  # names of the weights that multiply in the decoder blocks

    @classmethod
    def open(cls, path: Path) -> Source:
        manifest = read_manifest(path)
        verify(path, manifest)
        shards = [path / name for name in manifest.files if name.endswith(".safetensors")]
        model, quantization = empty_model(path, shards)
        _check_forms(path, model)
        schemes = quantization.schemes(model)
        files = {name: shard for shard in shards for name in tensor_shapes(shard)}
        dtype = model.config.dtype
        if not isinstance(dtype, torch.dtype):  # not said
            dtype = _dtype(files)
        weights = {}
        for name, tensor in model.state_dict().items():
            module, _, kind = name.rpartition(".")
            if name not in files or kind in ("weight_scale", "weight_zero"):
                continue  # the second name of tied weights, and what belongs to weight_packed
            shape, scheme = tuple(tensor.shape), None
            if kind == "weight_packed":
                packed = model.get_submodule(module)
                assert isinstance(packed, PackedLinear | PackedExperts | PackedEmbedding)
                name, shape, scheme = f"{module}.weight", (packed.rows, packed.columns), schemes[module]
            weights[name] = Weight(name=name, shape=shape, dtype=dtype, scheme=scheme, files=files)
        return cls(
            path=path,
            manifest=manifest,
            config=model.config,
            layout=layout_of(model),
            dtype=dtype,
            weights=weights,
            linears=frozenset(
                f"{path}.weight" for path, weight in model_weights(model).items() if not of_experts(weight)
            ),
        )

    @property
    def name(self) -> str:
        """What the model was called: the last part of its source's path."""
        return self.manifest.model.name

    @property
    def tied(self) -> bool:
        return f"{self.layout.head}.weight" not in self.weights

    def biases_beyond(self, places: Mapping[str, tuple[str, ...]]) -> list[str]:
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
        parts = (path.rpartition(".") for path in paths)
        return {f"{block}.{_FUSED[linear]}" for block, _, linear in parts if linear in _FUSED}

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


def _check_forms(path: Path, model: PreTrainedModel) -> None:
    """Exports write linears (O, I). Raises UPQError for weights that a dense checkpoint holds in another form."""
    for name, weight in model_weights(model).items():
        transposed = isinstance(weight, PackedLinear) and weight.transposed
        if transposed or of_experts(weight):
            what = "transposed linears" if transposed else "experts"
            raise UPQError(
                f"{path}: {model.config.model_type} has {what} ({name}), and no export holds them yet; run it with "
                "transformers"
            )


def _dtype(files: Mapping[str, Path]) -> torch.dtype:
    """Of the norms and all else that is not packed."""
    name = next(name for name in files if not name.endswith(("_packed", "_scale", "_zero")) and "norm" in name)
    return load_rows(files[name], name, 0, 1).dtype

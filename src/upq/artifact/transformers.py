"""UPQ artefacts in transformers: after `import upq`, plain `from_pretrained` and `save_pretrained` read and write them.

`config.json` holds, under `quantization_config`:

    quant_method    "upq"
    format_version  1
    linears         scheme of the linears in the decoder blocks
    overrides       by module path: another scheme, or null for a linear that stays as it was
    embeddings      null, or the scheme of the embedding and the head (one scale a row)
    activations     of an artefact that rounds them: the scheme of the linears' inputs (upq.core.act_scheme)
    input_scales    of static activations: the scale, by module path
    kv              of an artefact that rounds them: the scheme of keys and values
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from upq import decoding
from upq.artifact.manifest import Layer, Manifest, file_entry
from upq.artifact.publish import describe
from upq.core.act_scheme import ActScheme
from upq.core.config import decode
from upq.core.errors import UPQError
from upq.core.paths import local_or_hub
from upq.core.scheme import QTensor, QuantScheme
from upq.files.atomic import write_errors, written
from upq.files.tensors import tensor_shapes
from upq.grids import GRIDS, check_scheme, search_scale
from upq.model.layout import block_list, layout_of
from upq.model.library import library_errors
from upq.model.loading import auto_class, check_sizes, load_config, load_model
from upq.model.matrices import Matrix, place
from upq.model.online import install
from upq.nn.activations import ActQuantiser
from upq.nn.blocks import model_weights, of_experts
from upq.nn.experts import PackedExperts
from upq.nn.kv import attach_kv
from upq.nn.packed import PackedEmbedding, PackedLinear, TiedHead, dense_like, pack_like
from upq.text.tokenizer import write_tokenizer

FORMAT_VERSION = 1
_OURS = "is config.json from this upq?"
_ROWS = 4096  # rows of an embedding quantised at one time: the scale search holds several fp32 copies of them


def load(
    path: str | Path,
    *,
    dequantize: bool = False,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    decoder: Literal["upq", "transformers"] = "upq",
) -> PreTrainedModel:
    """A causal LM from an artefact, or any model transformers loads.

    >>> model = upq.load("qwen-2bit")
    >>> model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)

    path: directory or hub id.
    dequantize: dense layers in place of packed ones.
    dtype: of the computation; "auto" is the type in the model's config.
    device: "cpu" or "cuda".
    decoder: "upq" generates on the CPU through the compiled decoder (upq.decoding) where it can, "transformers" through
        transformers' own loop, as after `from_pretrained`.

    Returns the model in evaluation mode. Raises UPQError for what is damaged or cannot be loaded.
    """
    if decoder not in ("upq", "transformers"):
        raise UPQError(f"load: unknown decoder {decoder!r}; choose upq or transformers")
    model = load_model(local_or_hub(path), dtype=dtype, device=device)
    if isinstance(getattr(model, "hf_quantizer", None), UpqHfQuantizer):
        if dequantize:
            model.dequantize()  # type: ignore[no-untyped-call]
        elif decoder == "upq" and model.device.type == "cpu":
            decoding.attach(model)
    return model


# --- the plug-in ---------------------------------------------------------------------------------------------------


class UpqConfig(QuantizationConfigMixin):
    """`quantization_config` of an artefact. `dequantize` is a wish of the reader and never saved."""

    def __init__(
        self,
        *,
        linears: Mapping[str, Any] | QuantScheme,
        overrides: Mapping[str, Any] | None = None,
        embeddings: Mapping[str, Any] | QuantScheme | None = None,
        activations: Mapping[str, Any] | ActScheme | None = None,
        input_scales: Mapping[str, float] | None = None,
        kv: Mapping[str, Any] | ActScheme | None = None,
        format_version: int = FORMAT_VERSION,
        dequantize: bool = False,
        quant_method: str = "upq",
        **unknown: Any,
    ) -> None:
        if type(format_version) is not int:
            raise UPQError(f"quantization_config: format_version {format_version!r} is no number; {_OURS}")
        if format_version > FORMAT_VERSION:
            raise UPQError(
                f"quantization_config: format_version {format_version} is newer than this upq knows "
                f"({FORMAT_VERSION}); upgrade: pip install -U upq"
            )
        if unknown:
            raise UPQError(f"quantization_config: unknown key {min(unknown)!r}; {_OURS}")
        if not isinstance(overrides, Mapping | None):
            raise UPQError(f"quantization_config.overrides: expected an object, got {overrides!r}; {_OURS}")
        self.quant_method = cast(Any, quant_method)
        self.format_version = format_version
        self.linears = _scheme(linears, "linears")
        self.overrides = {
            path: None if s is None else _scheme(s, f"overrides.{path}")
            for path, s in sorted((overrides or {}).items())
        }
        self.embeddings = None if embeddings is None else _scheme(embeddings, "embeddings")
        self.activations, self.kv = _act_scheme(activations, "activations"), _act_scheme(kv, "kv")
        self.input_scales = _numbers(input_scales)
        self.dequantize = dequantize

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        version = config_dict.get("format_version", FORMAT_VERSION)
        if "linears" not in config_dict and not (isinstance(version, int) and version > FORMAT_VERSION):
            raise UPQError(f"quantization_config: key 'linears' is missing; {_OURS}")
        filled = {"linears": {}, **config_dict}
        return super().from_dict(filled, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    def to_dict(self) -> dict[str, Any]:
        overrides = {path: scheme and dataclasses.asdict(scheme) for path, scheme in self.overrides.items()}
        rounded: dict[str, Any] = {
            key: scheme.model_dump(mode="json")
            for key, scheme in (("activations", self.activations), ("kv", self.kv))
            if scheme is not None
        }
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "linears": dataclasses.asdict(self.linears),
            "overrides": overrides,
            "embeddings": self.embeddings and dataclasses.asdict(self.embeddings),
            **rounded,
            **({"input_scales": self.input_scales} if self.input_scales else {}),
        }

    def quantiser(self, path: str) -> ActQuantiser | None:
        """Of the inputs of a linear."""
        if self.activations is None:
            return None
        scale = self.input_scales.get(path)
        if self.activations.static and scale is None:
            raise UPQError(f"quantization_config.input_scales: {path} is missing; {_OURS}")
        return ActQuantiser(self.activations, scale if self.activations.static else None)

    def schemes(self, model: PreTrainedModel) -> dict[str, QuantScheme]:
        """Every module of `model` that is packed, by path."""
        weights = model_weights(model)
        if strangers := self.overrides.keys() - weights.keys():
            raise UPQError(f"quantization_config: override {min(strangers)!r} is no weight matrix of a decoder block")
        found = {path: self.overrides.get(path, self.linears) for path in weights}
        if self.embeddings is not None:
            found |= dict.fromkeys(embedding_tables(model), self.embeddings)
        packed = {path: scheme for path, scheme in found.items() if scheme is not None}
        if not packed:
            raise UPQError(f"quantization_config: nothing is packed; {_OURS}")
        return packed


def _scheme(raw: Mapping[str, Any] | QuantScheme, where: str) -> QuantScheme:
    if isinstance(raw, QuantScheme):
        return raw
    try:
        scheme = QuantScheme(**raw)
        check_scheme(scheme)
        return scheme
    except TypeError as error:
        raise UPQError(f"quantization_config.{where}: not a scheme ({error}); {_OURS}") from None


def _act_scheme(raw: Mapping[str, Any] | ActScheme | None, where: str) -> ActScheme | None:
    return raw if raw is None or isinstance(raw, ActScheme) else decode(ActScheme, raw, f"quantization_config.{where}")


def _numbers(raw: Any) -> dict[str, float]:
    found = {} if raw is None else raw
    if not isinstance(found, Mapping) or not all(isinstance(each, float | int) for each in found.values()):
        raise UPQError(f"quantization_config.input_scales: expected numbers by module path; {_OURS}")
    return {path: float(each) for path, each in sorted(found.items())}


class UpqHfQuantizer(HfQuantizer):
    """Swaps modules before the weights arrive; the tensors in the file are exactly the state of the packed modules."""

    requires_calibration = True  # transformers' word for: this method does not quantise while loading
    quantization_config: UpqConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            raise UPQError(
                f"a UPQ artefact loads with the class of its language model (or upq.load), not {type(model).__name__}"
            )
        _swap(model, self.quantization_config)
        guard = _guard(model, self.quantization_config)
        ignored = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*ignored, f"^{guard.replace('.', '[.]')}$"}
        _check_files(model, [Path(file) for file in checkpoint_files or []], guard)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return self._dequantize(model, model.dtype) if self.quantization_config.dequantize else model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers passes what the configuration says, which save_pretrained turns into a name.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for parameter in model.parameters():  # and not model.to(): the rotary frequencies stay float32
            parameter.data = parameter.data.to(dtype)
        for path, layer in list(model.named_modules()):
            if isinstance(layer, PackedLinear | PackedEmbedding):
                model.set_submodule(path, dense_like(layer, dtype))
            elif isinstance(layer, PackedExperts):
                parent, _, leaf = path.rpartition(".")
                experts = model.get_submodule(parent)
                del experts._modules[leaf]
                weight = layer.matrix.shaped(layer.dequantize(dtype)).contiguous()
                experts.register_parameter(leaf, nn.Parameter(weight))
            elif isinstance(layer, TiedHead):
                model.set_submodule(path, nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta"))
        install(model, model.config)
        vars(model).pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        # Without `import upq`, transformers warns of an unknown method and would start a model with random linears.
        # One byte under the name of a dense weight makes it stop on the size mismatch instead.
        guard = _guard(model, self.quantization_config)
        return {**model.state_dict(), guard: torch.zeros(1, dtype=torch.uint8)}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _swap(model: PreTrainedModel, config: UpqConfig, given: Callable[[str], QTensor] | None = None) -> None:
    """Put packed modules, empty or holding what is `given` for their path, in the place of dense ones."""
    layout, weights = layout_of(model), model_weights(model)
    tied = f"{layout.head}.weight" in model.all_tied_weights_keys
    for path, scheme in config.schemes(model).items():
        q, matrix = given(path) if given else None, weights.get(path)
        if isinstance(matrix, Matrix) and matrix.experts:
            whole = dataclasses.replace(matrix, name=path)
            layer = PackedExperts(matrix, scheme) if q is None else PackedExperts.from_qtensor(q, matrix)
            place(model, whole, layer.train(model.training))
        else:
            dense = model.get_submodule(path)
            packed = pack_like(dense, scheme, q)
            if isinstance(packed, PackedLinear) and path in weights:
                packed.input = config.quantiser(path)
            model.set_submodule(path, packed.train(dense.training))
    install(model, model.config)
    if config.kv is not None:
        for block in block_list(model, layout):
            attach_kv(block, config.kv)
    if config.embeddings is not None and tied:
        embedding = model.get_submodule(layout.embedding)
        assert isinstance(embedding, PackedEmbedding)
        model.set_submodule(layout.head, TiedHead(embedding).train(embedding.training))
        # TiedHead ties by itself; transformers would look for parameters called `weight`. What blocks share stays tied.
        name, named = f"{layout.head}.weight", model._tied_weights_keys
        others = {k: v for k, v in named.items() if k != name} if isinstance(named, dict) else {}
        model._tied_weights_keys = cast(Any, others or None)
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k != name}


def _guard(model: PreTrainedModel, config: UpqConfig) -> str:
    """The name of a linear's dense weight: transformers takes those of experts for an older layout's."""
    packed, weights = config.schemes(model), model_weights(model)
    linears = (path for path in packed if not of_experts(weights.get(path)))
    return f"{next(linears, next(iter(packed)))}.weight"


def _check_files(model: PreTrainedModel, files: list[Path], guard: str) -> None:
    """transformers fills what a file lacks with random numbers; here it is an error that names tensor and file."""
    if not files:
        raise UPQError("a UPQ artefact is loaded from its directory, not from a state_dict")
    found = {name: (file, shape) for file in files for name, shape in tensor_shapes(file).items()}
    where = files[0] if len(files) == 1 else files[0].parent
    remedy = "the artefact is incomplete or mixed up: download or write it again"
    for name, tensor in model.state_dict().items():
        if name in found and found[name][1] != tuple(tensor.shape):
            file, shape = found[name]
            raise UPQError(f"{file}: {name} has shape {shape}, expected {tuple(tensor.shape)}; {remedy}")
        if name not in found and model.all_tied_weights_keys.get(name) not in found:
            raise UPQError(f"{where}: tensor {name} is missing; {remedy}")
    if strangers := found.keys() - model.state_dict().keys() - {guard}:
        name = min(strangers)
        raise UPQError(f"{found[name][0]}: tensor {name} does not belong to this config.json; {remedy}")


def empty_model(path: Path, files: list[Path]) -> tuple[PreTrainedModel, UpqConfig]:
    """An artefact's model without memory, packed modules in place, and its quantisation; `files` checked against it."""
    config = load_config(path)
    raw = getattr(config, "quantization_config", None)
    if not isinstance(raw, dict) or raw.get("quant_method") != "upq":
        raise UPQError(f"{path}: config.json names no upq quantization; is it a UPQ artefact?")
    quantization: UpqConfig = UpqConfig.from_dict(raw)
    del config.quantization_config
    check_sizes(path, config, files)
    with library_errors(f"{path}: config.json describes no model"), torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config)
        _swap(model, quantization)
    _check_files(model, files, _guard(model, quantization))
    return model, quantization


# --- writing -------------------------------------------------------------------------------------------------------


def write_artifact(
    out: Path,
    model: PreTrainedModel,
    qtensors: Mapping[str, QTensor],
    *,
    manifest: Manifest,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: Path | None = None,
    embeddings_bits: Literal[4, 8] | None = None,
    extra_tensors: Mapping[str, Tensor] | None = None,
    errors: Mapping[str, float] | None = None,
    unreached: Mapping[str, list[int]] | None = None,
    activations: ActScheme | None = None,
    input_scales: Mapping[str, float] | None = None,
    kv: ActScheme | None = None,
) -> Manifest:
    """Pack `model` in place (see `pack_model`) and write it with its tokenizer as the new directory `out`, whole.

    `source`: the directory that model and tokenizer come from, whose small files are handed on (`write_companions`).
    Returns `manifest` as it stands in `out/upq.json`, with `layers` and `files` filled in. A layer has its part of
    `errors` and of `unreached`, both by path.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UPQError(f"{out}: exists already; name a new directory, or delete it first")
    config = pack_model(
        model,
        qtensors,
        embeddings_bits=embeddings_bits,
        extra_tensors=extra_tensors,
        activations=activations,
        input_scales=input_scales,
        kv=kv,
    )
    layers = [
        _layer(model.get_submodule(path), path, scheme, (errors or {}).get(path), (unreached or {}).get(path, []))
        for path, scheme in config.schemes(model).items()
    ]
    # The flag of a source may deny a head of its own, and what is packed could then not be loaded.
    model.config.tie_word_embeddings = len(embedding_tables(model)) == 1
    with written(out) as scratch:
        scratch.mkdir(parents=True)
        with library_errors(f"{out}: cannot save"), write_errors(out):
            # Under the names in memory: a source in an old layout must not hand its names down.
            model.save_pretrained(scratch, save_original_format=False)
        write_companions(scratch, tokenizer, source)
        written_files = sorted(file for file in scratch.rglob("*") if file.is_file())
        files = {file.relative_to(scratch).as_posix(): file_entry(file) for file in written_files}
        manifest = manifest.model_copy(update={"layers": layers, "files": files})
        describe(scratch, manifest)
    return manifest


def write_companions(out: Path, tokenizer: PreTrainedTokenizerBase | None, source: Path | None) -> None:
    """What stands beside the weights of a model: its tokenizer and its settings for generation, those of `source`."""
    if tokenizer is not None:
        with library_errors(f"{out}: cannot save the tokenizer"), write_errors(out):
            write_tokenizer(tokenizer, out, model=source)
    if source is not None and (settings := source / "generation_config.json").is_file():
        shutil.copyfile(settings, out / settings.name)  # for its users: a run takes none of it but the end tokens


def pack_model(
    model: PreTrainedModel,
    qtensors: Mapping[str, QTensor],
    *,
    embeddings_bits: Literal[4, 8] | None = None,
    extra_tensors: Mapping[str, Tensor] | None = None,
    activations: ActScheme | None = None,
    input_scales: Mapping[str, float] | None = None,
    kv: ActScheme | None = None,
) -> UpqConfig:
    """Turn a dense model into the packed one, in place: as if it had been loaded from the artefact.

    `qtensors`: path to value; weights of the blocks that are not among them stay dense.
    `extra_tensors`: parameter name to value, for what was trained beside the codes (norms).
    `activations`, `kv`: how inputs of linears, keys and values are rounded; `input_scales` by path, of static ones.
    """
    for name, value in (extra_tensors or {}).items():
        parameter = dict(model.named_parameters()).get(name)
        if parameter is None or parameter.shape != value.shape:
            raise UPQError(f"extra tensor {name} {tuple(value.shape)} is no parameter of {type(model).__name__}")
        parameter.data.copy_(value)
    weights = model_weights(model)
    if strangers := qtensors.keys() - weights.keys():
        raise UPQError(f"{min(strangers)} is no weight matrix of a decoder block of {type(model).__name__}")
    if not qtensors:
        raise UPQError("no quantised weight to write")
    schemes = {path: qtensors[path].scheme if path in qtensors else None for path in weights}
    common = Counter(scheme for scheme in schemes.values() if scheme is not None).most_common(1)[0][0]
    config = UpqConfig(
        linears=common,
        overrides={path: cast(Any, scheme) for path, scheme in schemes.items() if scheme != common},
        embeddings=QuantScheme(bits=embeddings_bits) if embeddings_bits else None,
        activations=activations,
        input_scales=input_scales,
        kv=kv,
    )
    tables = embedding_tables(model) if config.embeddings else []
    rows = {path: quantize_rows(_weight(model, path), cast(QuantScheme, config.embeddings)) for path in tables}
    _swap(model, config, lambda path: rows[path] if path in rows else qtensors[path])
    model.config.quantization_config = config
    model.hf_quantizer = UpqHfQuantizer(config)  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    return config


@torch.no_grad()
def quantize_rows(w_VI: Tensor, scheme: QuantScheme) -> QTensor:
    """An embedding or head on `scheme`, every row with the scale of least squared error."""
    grid = GRIDS.get(scheme.grid).settled([w_VI.detach()])
    chunks = torch.split(w_VI.detach().float(), _ROWS)
    found = [search_scale(w, scheme, grid=grid) for w in chunks]
    codes_VI = torch.cat([grid.codes(w, params, scheme) for w, params in zip(chunks, found, strict=True)])
    return grid.qtensor(codes_VI, {name: torch.cat([params[name] for params in found]) for name in found[0]}, scheme)


def embedding_tables(model: PreTrainedModel) -> list[str]:
    """Paths of the embedding and, where it has a weight of its own, the head."""
    layout = layout_of(model)
    own_head = not isinstance(model.get_submodule(layout.head), TiedHead)
    tied = not own_head or f"{layout.head}.weight" in model.all_tied_weights_keys
    return [layout.embedding] if tied else [layout.embedding, layout.head]


def _weight(model: PreTrainedModel, path: str) -> Tensor:
    return cast(Tensor, model.get_submodule(path).weight)


def _layer(module: nn.Module, path: str, scheme: QuantScheme, error: float | None, unreached: list[int]) -> Layer:
    state = [t for name, t in module.state_dict().items() if name != "bias"]
    packed = cast(PackedLinear | PackedExperts | PackedEmbedding, module)
    rows, columns = packed.rows, packed.columns
    return Layer(
        name=path,
        bits=scheme.bits,
        group_size=scheme.group_size,
        grid=scheme.grid,
        weights=rows * columns,
        bits_per_weight=8 * sum(t.nbytes for t in state) / (rows * columns),
        error=error,
        unreached=unreached,
    )

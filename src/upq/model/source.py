"""Reads a model on disk one decoder block at a time; the rest of it is a layout without memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from upq.core.errors import UPQError
from upq.core.memory import trim
from upq.files.tensors import tensor_files
from upq.model.loading import check_sizes, check_types, decoder_blocks, family, library_errors, load_config, stored_name


class Source:
    """A Hugging Face directory, read in parts: decoder blocks, embeddings, and what comes after the blocks.

    In float32 unless `dtype` says otherwise. It runs nothing (upq.model.walker does).
    """

    def __init__(
        self, path: Path, *, device: str = "cpu", dtype: torch.dtype | Literal["auto"] = torch.float32
    ) -> None:
        """`dtype` auto: the model's own type, as in `load_model`."""
        config = load_config(path)
        family(config)
        self._files = tensor_files(path)
        check_sizes(path, config, self._files.values())
        check_types(path, config, self._files.values())
        self._lay_out(path, config, device, self._own_dtype(config) if dtype == "auto" else dtype)

    @classmethod
    def without_files(cls, config: PretrainedConfig) -> Self:
        """The layout of a model whose checkpoint need not be there: none of its tensors can be read."""
        source = cls.__new__(cls)
        source._files = {}
        source._lay_out(Path(config.name_or_path or ""), config, "cpu", torch.float32)
        return source

    def _lay_out(self, path: Path, config: PretrainedConfig, device: str, dtype: torch.dtype) -> None:
        """The part of the constructor that reads no tensors."""
        self.path = path
        self.device = torch.device(device)
        self.dtype = dtype
        self.config = config
        self.spec = family(config)
        self._layout = self.empty()
        self._blocks = list(decoder_blocks(self._layout))

    def __len__(self) -> int:
        return len(self._blocks)

    def in_features(self, linear: str) -> int:
        """Width of a block's linear, from the config alone."""
        module = self._blocks[0].get_submodule(linear)
        assert isinstance(module, nn.Linear)
        return module.in_features

    def block(self, index: int) -> nn.Module:
        """Decoder block `index` with its own weights. The caller owns it; nothing else refers to its memory."""
        # A copy of an empty layout costs nothing.
        block = copy.deepcopy(self._blocks[index])
        self._fill(block, f"{self.spec.blocks}.{index}.")
        return block.to(self.device)

    def without_blocks(self) -> PreTrainedModel:
        """The model with all its own weights but those of its decoder blocks, which have no memory."""
        model, spec = self.empty(), self.spec
        for path in (spec.embedding, spec.final_norm, spec.head):
            if f"{path}.weight" in self._files or f"{path}.weight" not in model.all_tied_weights_keys:
                self._fill(model.get_submodule(path), f"{path}.")
        embedding, head = (model.get_parameter(f"{path}.weight") for path in (spec.embedding, spec.head))
        # As transformers does: a head of a tied model that is in the checkpoint and differs is one of its own.
        if head.is_meta or (model.all_tied_weights_keys and torch.equal(head, embedding)):
            model.get_submodule(spec.head).weight = embedding
        else:
            model.all_tied_weights_keys.pop(f"{spec.head}.weight", None)
        return self._with_buffers(model)

    def fill_blocks(self, model: PreTrainedModel, prepare: Callable[[int, nn.Module], nn.Module]) -> None:
        """Put `prepare(i, block i)` in each place of `model`'s blocks. One block at a time is in memory."""
        places = decoder_blocks(model)
        for index in range(len(self)):
            places[index] = prepare(index, self.block(index))
            trim()  # shards lie between what a block leaves: after 8 blocks of 61 MB, glibc kept 180

    def norm_and_head(self) -> tuple[nn.Module, nn.Module]:
        """Final norm and head."""
        model = self.without_blocks()
        return model.get_submodule(self.spec.final_norm), model.get_submodule(self.spec.head)

    def skeleton(self) -> PreTrainedModel:
        """The model for a replay: nothing is read. The final norm has zeros, all other weights have no memory."""
        model = self.empty()
        norm = model.get_submodule(self.spec.final_norm).to_empty(device=self.device)
        for weight in norm.parameters():
            weight.zero_()
        return self._with_buffers(model)

    def without_linears(self) -> PreTrainedModel:
        """The model with all its own weights but those of its blocks' linears, which have no memory.

        Law (tests/test_hf.py): packed and saved, it gives the bytes of the model that was loaded whole, but for
        `generation_config`, which it has from its config alone.
        """
        model, linears = self.without_blocks(), {f"{name}.weight" for name in self.spec.linears}
        for index, block in enumerate(decoder_blocks(model)):
            prefix = f"{self.spec.blocks}.{index}."
            rest = {name: empty.shape for name, empty in block.state_dict().items() if name not in linears}
            tensors = {name: self._tensor(prefix + name, shape).to(self.device) for name, shape in rest.items()}
            block.load_state_dict(tensors, strict=False, assign=True)
        model.requires_grad_(False)
        return model

    def weight(self, index: int, linear: str) -> Tensor:
        """Weight (O, I) of a linear of block `index`, read anew."""
        module = self._blocks[index].get_submodule(linear)
        assert isinstance(module, nn.Linear)
        return self._tensor(f"{self.spec.blocks}.{index}.{linear}.weight", module.weight.shape).to(self.device)

    def inputs(self, ids_BT: Tensor, hidden_BTH: Tensor | None = None) -> dict[str, Tensor]:
        """What the decoder is called with for tokens (B, T): their embeddings, of which only these rows are read.

        `hidden_BTH` stands in for them where only their shape and type count.
        """
        return {"inputs_embeds": self._embeddings(ids_BT) if hidden_BTH is None else hidden_BTH}

    def _embeddings(self, ids_BT: Tensor) -> Tensor:
        """Embeddings (B, T, H) of tokens. The whole matrix in float32 would be the largest thing in memory."""
        embedding = self._layout.get_submodule(self.spec.embedding)
        assert isinstance(embedding, nn.Embedding)
        used_R, places_BT = ids_BT.cpu().unique(return_inverse=True)  # type: ignore[no-untyped-call]
        rows_RH = self._tensor(f"{self.spec.embedding}.weight", embedding.weight.shape, rows=used_R)
        return F.embedding(places_BT.to(self.device), rows_RH.to(self.device))

    def empty(self) -> PreTrainedModel:
        """The model without memory."""
        auto: Any = AutoModelForCausalLM  # untyped
        config = copy.deepcopy(self.config)  # from_config writes the type into it
        # Parameters on meta, buffers real: the rotary frequencies are not in the checkpoint.
        doing = f"{self.path}: config.json describes no model"
        # Random numbers for weights without memory would take a tenth of a small run.
        with library_errors(doing), init_empty_weights(include_buffers=False), no_init_weights():
            model: PreTrainedModel = auto.from_config(config, dtype=self.dtype)
        model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
        return model

    def _with_buffers(self, model: PreTrainedModel) -> PreTrainedModel:
        for module in model.modules():
            module._buffers.update({name: b.to(self.device) for name, b in module._buffers.items() if b is not None})
        return model

    def _fill(self, module: nn.Module, prefix: str) -> None:
        shapes = {name: empty.shape for name, empty in module.state_dict().items()}
        tensors = {name: self._tensor(prefix + name, shape).to(self.device) for name, shape in shapes.items()}
        module.load_state_dict(tensors, assign=True)
        module.requires_grad_(False)

    def _tensor(self, name: str, shape: torch.Size, *, rows: Tensor | None = None) -> Tensor:
        """One tensor of the checkpoint, which the config gives `shape`, in `dtype`; all of it or some rows."""
        name = stored_name(name, self._files, self._layout.all_tied_weights_keys)
        if name not in self._files:
            raise UPQError(f"{self.path}: tensor {name} is missing from the checkpoint; is the download complete?")
        with _opened(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)  # mapped: what is not looked at is not read
        if tensor.shape != shape:
            shapes = f"{tuple(tensor.shape)}, but the config says {tuple(shape)}"
            raise UPQError(f"{self.path}: tensor {name} has shape {shapes}; is config.json of this model?")
        if rows is not None:
            tensor = tensor[rows]
        if not tensor.isfinite().all():
            raise UPQError(f"{self.path}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
        return tensor.to(self.dtype)

    def _own_dtype(self, config: PretrainedConfig) -> torch.dtype:
        """What the config says, or else the first tensor of the first file: transformers' rule."""
        if isinstance(config.dtype, torch.dtype):
            return config.dtype
        with _opened(min(self._files.values())) as file:
            dtypes = (file.get_tensor(name).dtype for name in file.keys())  # noqa: SIM118  (not a mapping)
            return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UPQError(f"{file}: damaged or truncated ({reason}); is the download complete?") from error

"""A model on disk, read one decoder block at a time: the rest of it is a skeleton without memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from upq.core.errors import UPQError
from upq.core.precision import Precision, computes_in_bf16
from upq.files.tensors import tensor_files
from upq.model.activations import Activations, Allocate, in_memory, stretches
from upq.model.loading import check_sizes, decoder_blocks, family, library_errors, load_config

Context = dict[str, Any]  # keyword arguments of a decoder block: positions, mask, rotary embeddings


class StreamedModel:
    """Blocks and embeddings of a Hugging Face directory, materialised on request, in float32 unless asked.

    Law (tests/test_streaming.py): embedding, blocks in order, final norm and head give the logits of the whole model.
    What `precision` says is in `bf16` and `autocast`, for whoever calls the blocks; what they are given and give stays
    float32.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | Literal["auto"] = torch.float32,
        precision: Precision = "fp32",
    ) -> None:
        """`dtype` auto: the model's own type, as in `load_model`."""
        config = load_config(path)
        family(config)
        self._files = tensor_files(path)
        check_sizes(path, config, self._files.values())
        self._lay_out(path, config, device, self._own_dtype(config) if dtype == "auto" else dtype, precision)

    @classmethod
    def without_files(cls, config: PretrainedConfig) -> Self:
        """The layout of a model whose checkpoint need not be there: none of its tensors can be read."""
        model = cls.__new__(cls)
        model._files = {}
        model._lay_out(Path(config.name_or_path or ""), config, "cpu", torch.float32, "fp32")
        return model

    def _lay_out(
        self, path: Path, config: PretrainedConfig, device: str, dtype: torch.dtype, precision: Precision
    ) -> None:
        """All that does not ask for the checkpoint's tensors."""
        self.path = path
        self.device = torch.device(device)
        self.dtype = dtype
        self.bf16 = computes_in_bf16(precision, self.device, config.hidden_size)
        self.config = config
        self.spec = family(config)
        self._skeleton = self.empty()
        self._blocks = list(decoder_blocks(self._skeleton))

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

    def autocast(self) -> AbstractContextManager[object]:
        """What a block is to be called in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def frame(self) -> PreTrainedModel:
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
        for module in model.modules():
            module._buffers.update({name: b.to(self.device) for name, b in module._buffers.items() if b is not None})
        return model

    def ending(self) -> tuple[nn.Module, nn.Module]:
        """Final norm and head."""
        frame = self.frame()
        return frame.get_submodule(self.spec.final_norm), frame.get_submodule(self.spec.head)

    def without_linears(self) -> PreTrainedModel:
        """The model with all its own weights but those of its blocks' linears, which have no memory.

        Law (tests/test_hf.py): packed and saved, it gives the bytes of the model that was loaded whole, but for
        `generation_config`, which it has from its config alone.
        """
        model, linears = self.frame(), {f"{name}.weight" for name in self.spec.linears}
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

    @torch.no_grad()
    def embed(
        self, tokens_NT: Tensor, *, batch_size: int = 8, allocate: Allocate = in_memory
    ) -> tuple[Activations, list[Context]]:
        """Hidden states (N, T, H) before the first block, and what each block is called with beside them.

        Of the embedding only the rows of each batch's tokens are read. Blocks of one kind share their context.
        """
        decoder = self._skeleton.get_submodule(self.spec.decoder)
        recorders = [_Recorder(block) for block in self._blocks]
        self._skeleton.set_submodule(self.spec.blocks, nn.ModuleList(recorders))
        self._skeleton.set_submodule(self.spec.final_norm, nn.Identity())

        def run(ids_BT: Tensor) -> Tensor:
            hidden_BTH: Tensor = decoder(inputs_embeds=self._embeddings(ids_BT), use_cache=False).last_hidden_state
            return hidden_BTH

        hidden_NTH: Activations | None = None
        for rows in stretches(len(tokens_NT), batch_size):
            hidden_BTH = run(tokens_NT[rows])
            if hidden_NTH is None:
                hidden_NTH = allocate(torch.Size((len(tokens_NT), *hidden_BTH.shape[1:])), self.device)
            hidden_NTH[rows] = hidden_BTH.float()
        assert hidden_NTH is not None
        # Positions and mask are the same for every row, so one row's context serves any batch.
        run(tokens_NT[:1])
        return hidden_NTH, [r.context for r in recorders]

    def _embeddings(self, ids_BT: Tensor) -> Tensor:
        """Embeddings (B, T, H) of tokens. The whole matrix in float32 would be the largest thing in memory."""
        embedding = self._skeleton.get_submodule(self.spec.embedding)
        assert isinstance(embedding, nn.Embedding)
        used_R, places_BT = ids_BT.cpu().unique(return_inverse=True)  # type: ignore[no-untyped-call]
        rows_RH = self._tensor(f"{self.spec.embedding}.weight", embedding.weight.shape, rows=used_R)
        return F.embedding(places_BT.to(self.device), rows_RH.to(self.device))

    def empty(self) -> PreTrainedModel:
        """The model without memory."""
        auto: Any = AutoModelForCausalLM  # untyped
        config = copy.deepcopy(self.config)  # it is told the type, and may be told more
        # Parameters on meta, buffers real: the rotary frequencies are not in the checkpoint.
        with library_errors(f"{self.path}: config.json describes no model"), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto.from_config(config, dtype=self.dtype)
        model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
        return model

    def _fill(self, module: nn.Module, prefix: str) -> None:
        shapes = {name: empty.shape for name, empty in module.state_dict().items()}
        tensors = {name: self._tensor(prefix + name, shape).to(self.device) for name, shape in shapes.items()}
        module.load_state_dict(tensors, assign=True)
        module.requires_grad_(False)

    def _tensor(self, name: str, shape: torch.Size, *, rows: Tensor | None = None) -> Tensor:
        """One tensor of the checkpoint, which the config gives `shape`, in `dtype`; all of it or some rows."""
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


class _Recorder(nn.Module):
    """Stands in for a decoder block and keeps what it was called with."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.context: Context = {}
        if hasattr(block, "attention_type"):  # read by decoders that mix full and sliding attention
            self.attention_type = block.attention_type

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        self.context = {k: v for k, v in context.items() if k not in ("past_key_values", "use_cache")}
        return hidden_states


@torch.no_grad()
def run_block(
    block: nn.Module,
    hidden_NTH: Activations,
    context: Context,
    *,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Put a block's outputs in the place of its inputs, in their order and batches (so a rerun is bit-identical).

    `dtype` is the block's own; float32 holds any other's values exactly.
    """
    for rows in stretches(len(hidden_NTH), batch_size):
        hidden_NTH[rows] = block(hidden_NTH[rows].to(dtype), **context).float()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UPQError(f"{file}: damaged or truncated ({reason}); is the download complete?") from error

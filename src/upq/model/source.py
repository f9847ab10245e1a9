"""Reads a model on disk one decoder block at a time; the rest of it is a layout without memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Self

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights

from upq.core.memory import trim
from upq.files.tensors import tensor_files
from upq.model.checkpoint import Checkpoint
from upq.model.layout import Layout, block_list, layout_of, shared_weights
from upq.model.library import library_errors
from upq.model.loading import auto_class, check_sizes, check_types, load_config, text_config
from upq.model.matrices import Matrix, matrices
from upq.model.online import install
from upq.model.tables import Table, put_table


class Source:
    """A Hugging Face directory, read in parts: decoder blocks, embeddings, and what comes after the blocks.

    In float32 unless `dtype` says otherwise. It runs nothing (upq.model.walker does).
    """

    def __init__(
        self, path: Path, *, device: str = "cpu", dtype: torch.dtype | Literal["auto"] = torch.float32
    ) -> None:
        """`dtype` auto: the model's own type, as in `load_model`."""
        config, files = load_config(path), tensor_files(path)
        check_sizes(path, config, files.values())
        check_types(path, config, files.values())
        self._lay_out(path, config, device, torch.float32 if dtype == "auto" else dtype)
        self._checkpoint = Checkpoint(path, files, self.outline)
        if dtype == "auto":
            self.dtype = config.dtype if isinstance(config.dtype, torch.dtype) else self._checkpoint.dtype()

    @classmethod
    def without_files(cls, config: PretrainedConfig) -> Self:
        """The layout of a model whose checkpoint need not be there: none of its tensors can be read."""
        source = cls.__new__(cls)
        source._lay_out(Path(config.name_or_path or ""), config, "cpu", torch.float32)
        source._checkpoint = Checkpoint(source.path, {}, source.outline)
        return source

    def _lay_out(self, path: Path, config: PretrainedConfig, device: str, dtype: torch.dtype) -> None:
        """The part of the constructor that reads no tensors."""
        self.path = path
        self.device = torch.device(device)
        self.dtype = dtype
        self.config = config
        self.outline: PreTrainedModel = self.empty()  # to be looked at, not to be changed
        self.layout: Layout = layout_of(self.outline)
        self._blocks = list(block_list(self.outline, self.layout))
        shared = shared_weights(self.outline)
        self._matrices = [
            tuple(m for m in matrices(block) if self._at(index, m.parameter) not in shared)
            for index, block in enumerate(self._blocks)
        ]

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def text(self) -> PretrainedConfig:
        """The configuration of the language model: of a model for images too, a part of its own."""
        return text_config(self.config)

    def matrices(self, index: int) -> tuple[Matrix, ...]:
        """The weights of block `index` that become codes."""
        return self._matrices[index]

    def block(self, index: int) -> nn.Module:
        """Decoder block `index` with its own weights. The caller owns it; nothing else refers to its memory."""
        # A copy of an empty layout costs nothing.
        block = copy.deepcopy(self._blocks[index])
        tensors = {name: self._tensor(self._at(index, name)) for name in block.state_dict()}
        block.load_state_dict(tensors, assign=True)
        block.requires_grad_(False)
        return block.to(self.device)

    def without_blocks(self) -> PreTrainedModel:
        """The model with all its own weights but those of its decoder blocks, which have no memory.

        Nor have towers beside the decoder, for images or sound.
        """
        model = self.empty()
        self._fill(model, self._of_decoder(model))
        return self._with_buffers(model)

    def fill_blocks(self, model: PreTrainedModel, prepare: Callable[[int, nn.Module], nn.Module]) -> None:
        """Put `prepare(i, block i)` in each place of `model`'s blocks. One block at a time is in memory."""
        places = block_list(model, self.layout)
        for index in range(len(self)):
            places[index] = prepare(index, self.block(index))
            trim()  # shards lie between what a block leaves: after 8 blocks of 61 MB, glibc kept 180

    def skeleton(self) -> PreTrainedModel:
        """The model for a replay: all its own weights beside the blocks, but large tables, which stay on disk.

        The blocks, the head and towers have no memory.
        """
        model = self.empty()
        for path, module in model.named_modules():
            if self._in_decoder(path) and self._is_table(module):
                assert isinstance(module, nn.Embedding)
                name = f"{path}.weight"
                shape = self._checkpoint.shape(name)
                put_table(module, Table(shape, self.dtype, self.device, partial(self._rows, name)))
        self._fill(model, [name for name in self._of_decoder(model) if not self._of_head(name)])
        return self._with_buffers(model)

    def without_matrices(self) -> PreTrainedModel:
        """The model with all its own weights but those that become codes, which have no memory.

        Law (tests/test_hf.py): packed and saved, it gives the bytes of the model that was loaded whole, but for
        `generation_config`, which it has from its config alone.
        """
        model = self.empty()
        coded = {self._at(i, m.parameter) for i, found in enumerate(self._matrices) for m in found}
        self._fill(model, [name for name in model.state_dict() if name not in coded])
        model.requires_grad_(False)
        return self._with_buffers(model)

    def weight(self, index: int, matrix: Matrix) -> Tensor:
        """A weight (E·O, I) of block `index`, read anew."""
        return matrix.flat(self._tensor(self._at(index, matrix.parameter)).to(self.device))

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model by its path."""
        return self._tensor(name)

    def path_of(self, index: int, name: str) -> str:
        """Of a weight's name within block `index`, the path in the model."""
        return self._at(index, name)

    def empty(self) -> PreTrainedModel:
        """The model without memory."""
        config = copy.deepcopy(self.config)  # from_config writes the type into it
        # Parameters on meta, buffers real: the rotary frequencies are not in the checkpoint.
        doing = f"{self.path}: config.json describes no model"
        # Random numbers for weights without memory would take a tenth of a small run.
        with library_errors(doing), init_empty_weights(include_buffers=False), no_init_weights():
            model: PreTrainedModel = auto_class(config).from_config(config, dtype=self.dtype)
        model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
        install(model, config)
        return model

    def _at(self, index: int, name: str) -> str:
        return f"{self.layout.blocks}.{index}.{name}"

    def _in_decoder(self, path: str) -> bool:
        return path.startswith(f"{self.layout.decoder}.") and not path.startswith(f"{self.layout.blocks}.")

    def _is_table(self, module: nn.Module) -> bool:
        """The embedding, and every other that has as many rows: of a token's inputs to each block, for one."""
        embedding = self.outline.get_submodule(self.layout.embedding)
        assert isinstance(embedding, nn.Embedding)
        return isinstance(module, nn.Embedding) and module.num_embeddings >= embedding.num_embeddings

    def _of_head(self, name: str) -> bool:
        return name.startswith(f"{self.layout.head}.")

    def _of_decoder(self, model: PreTrainedModel) -> list[str]:
        """Names of the tensors of the decoder and the head, but those of blocks."""
        return [name for name in model.state_dict() if self._in_decoder(name) or self._of_head(name)]

    def _fill(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        """Read tensors of the model by name, then tie what is tied."""
        tied, filled = dict(model.all_tied_weights_keys), set(names)
        for name in filled:
            if name in self._checkpoint or name not in tied:
                _put(model, name, self._tensor(name).to(self.device))
        for name in filled & set(tied):
            own, other = model.get_parameter(name), model.get_parameter(tied[name])
            # As transformers does: a head of a tied model that is in the checkpoint and differs is one of its own.
            if own.is_meta or torch.equal(own, other):
                _put(model, name, other)
            else:
                model.all_tied_weights_keys.pop(name)
        model.requires_grad_(False)

    def _with_buffers(self, model: PreTrainedModel) -> PreTrainedModel:
        for module in model.modules():
            module._buffers.update({name: b.to(self.device) for name, b in module._buffers.items() if b is not None})
        return model

    def _rows(self, name: str, rows: Tensor) -> Tensor:
        return self._tensor(name, rows=rows)

    def _tensor(self, name: str, *, rows: Tensor | None = None) -> Tensor:
        """One tensor of the model, in `dtype` where it is a float; what a class keeps in float32 stays in it."""
        tensor = self._checkpoint.tensor(name, rows=rows)
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if self._kept and self._kept[0].search(name) else self.dtype)

    @cached_property
    def _kept(self) -> tuple[re.Pattern[str], ...]:
        """What names of tensors in float32 match, whatever the type of the model (`_keep_in_fp32_modules`)."""
        plan = self.outline._get_dtype_plan(self.dtype)
        return (build_glob_alternation(list(plan))[0],) if plan else ()


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """A parameter or a buffer of the model, by name; a parameter that is given is shared."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)

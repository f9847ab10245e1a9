"""Each family against a random model: its description lists every linear once, in order, by what it reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tiny import tiny_model
from upq.core.errors import UPQError
from upq.model.families import FAMILIES
from upq.model.layout import block_list
from upq.model.loading import family

IDS = torch.arange(6)[None]


@pytest.mark.parametrize("name", FAMILIES.names())
class TestLaws:
    def test_every_linear_of_every_block_is_listed_once(self, name: str) -> None:
        spec, model = FAMILIES.get(name), tiny_model(name)
        assert family(model.config) is spec
        for block in model.get_submodule(spec.blocks):
            linears = [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
            assert sorted(linears) == sorted(spec.linears)
        outside = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert {path for path in outside if not path.startswith(f"{spec.blocks}.")} == {spec.head}

    def test_linears_of_a_group_read_the_same_tensor(self, name: str) -> None:
        """And the groups run in the order they are listed in, so that a later one can make up for an earlier one."""
        spec, model = FAMILIES.get(name), tiny_model(name)
        block = model.get_submodule(spec.blocks)[1]
        seen: list[tuple[str, Tensor]] = []
        for path in spec.linears:
            block.get_submodule(path).register_forward_pre_hook(
                lambda _module, args, path=path: seen.append((path, args[0]))
            )
        model(IDS)
        inputs = dict(seen)
        for group in spec.groups:
            assert len({inputs[path].data_ptr() for path in group}) == 1, group
        firsts = [inputs[group[0]] for group in spec.groups]
        assert len({x.data_ptr() for x in firsts}) == len(firsts)  # all still held, so no memory is used twice
        rank = {path: i for i, group in enumerate(spec.groups) for path in group}
        order = [rank[path] for path, _ in seen]
        assert order == sorted(order)
        assert len(seen) == len(spec.linears)

    def test_the_parts_are_where_the_description_says(self, name: str) -> None:
        spec, model = FAMILIES.get(name), tiny_model(name, tie_word_embeddings=False)
        assert model.get_submodule(spec.embedding) is model.get_input_embeddings()
        assert model.get_submodule(spec.head) is model.get_output_embeddings()
        assert block_list(model) is model.get_submodule(spec.blocks)
        assert model.get_decoder() is model.get_submodule(spec.decoder)
        decoder, norm = model.get_submodule(spec.decoder), model.get_submodule(spec.final_norm)
        between: list[Tensor] = []
        norm.register_forward_hook(lambda _module, _args, out: between.append(out))
        hidden = decoder(input_ids=IDS, use_cache=False).last_hidden_state
        assert torch.equal(hidden, between[0])
        assert torch.equal(model.get_submodule(spec.head)(hidden), model(IDS).logits)


def test_an_unknown_family_lists_the_known_ones() -> None:
    config = tiny_model("llama").config
    config.model_type = "gpt5"
    with pytest.raises(UPQError, match=rf"'gpt5' is not supported \(known: {', '.join(FAMILIES.names())}\)"):
        family(config)

"""A tiny model with an attention sink, as large ones have: one neuron gives the first token a massive state."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny import tiny_model

BOS = 1
BLOCK, CHANNEL, NEURON = 1, 7, 5  # of three blocks: where the state is made, and by which weight of down_proj
_CONSTANT = 11  # a channel that all tokens share, so that every query has a part in common
_HEAD = 16


@torch.no_grad()
def sink_model() -> PreTrainedModel:
    """The first token of a row, BOS, gets a state over a hundred times the others', and attention rests on it."""
    model = tiny_model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=_HEAD,
        tie_word_embeddings=False,
    )
    embedding = model.model.embed_tokens.weight
    embedding[:, _CONSTANT] = 0.5
    direction = torch.ones(64)
    direction[::2] = -1
    direction[[_CONSTANT, CHANNEL]] = 0
    along = torch.outer(direction, direction) / direction.square().sum()
    embedding -= embedding @ along
    embedding[BOS] += direction
    before, block, last = model.model.layers
    for linear in (before.self_attn.o_proj, before.mlp.down_proj, block.self_attn.o_proj):
        linear.weight -= along @ linear.weight
    for linear in (block.mlp.gate_proj, block.mlp.up_proj):
        linear.weight[NEURON] = direction / 2
    block.mlp.down_proj.weight[:, NEURON] *= 0.1
    block.mlp.down_proj.weight[CHANNEL, NEURON] = 3.0
    # The slowest pair of rotary dimensions: the distance to the sink hardly counts.
    slow = torch.arange(_HEAD // 2 - 1, 4 * _HEAD, _HEAD)
    last.self_attn.k_proj.weight[slow, CHANNEL] = 3.0
    last.self_attn.q_proj.weight[slow, _CONSTANT] = 3.0
    return model


def rows(count: int, length: int) -> Tensor:
    """Token ids (count, length); each row begins with BOS, which is nowhere else."""
    ids = torch.randint(2, 67, (count, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    return ids

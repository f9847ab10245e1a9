"""Names the tokens with massive states in a block's output, and the weights that make them.

Those weights are few (super weights, arXiv 2411.07191): in SmolLM2-135M two of 106 million.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from upq.blockwise._base import QUANTISED, BlockTask
from upq.model.matrices import Matrix
from upq.model.products import seen

_ROWS = 8  # of calibration, with such tokens, that are looked at
_SHARE = 0.1  # of what a product writes into the massive channel, for a weight to be named
_NAMED = 4


@torch.no_grad()
def sinks(task: BlockTask) -> dict[str, Any] | None:
    """None for a block without massive states. The block must hold the original's weights.

    tokens, of, usual: how many, of how many, and the geometric mean of all norms. From this process's first rows: norm,
    channel (the largest), first (how many lead their row), ids (the commonest of the tokens), and weights, where this
    block makes the states: name, row, column, value, and share of what the product writes into the channel.
    """
    found, usual = task.tokens, task.tokens.usual
    if not found.massive:
        return None
    report: dict[str, Any] = {"tokens": found.massive, "of": found.count, "usual": usual}
    massive_NT = found.massive_NT.cpu()  # where the tokens are
    rows = massive_NT.any(1).nonzero()[:_ROWS, 0]
    if not len(rows):  # they lie in other processes
        return report
    massive_BT = massive_NT[rows]
    states_KH = task.targets_NTH[rows][massive_BT].flatten(1)
    channel = int(states_KH.mean(0).abs().argmax())
    ids = Counter(task.step.tokens_NT[rows][massive_BT].tolist())
    inputs_KH = task.inputs_NTH[rows][massive_BT].flatten(1)
    norm = float(states_KH.norm(dim=-1).mean())
    born = inputs_KH.norm(dim=-1).mean() < norm / 4  # what the blocks before have lost is not made anew
    return report | {
        "norm": norm,
        "channel": channel,
        "first": int(massive_BT[:, 0].sum()),
        "ids": [token for token, _ in ids.most_common(_NAMED)],
        "weights": _makers(task, rows, massive_BT, channel) if born else [],
    }


def _makers(task: BlockTask, rows: Tensor, massive_BT: Tensor, channel: int) -> list[dict[str, Any]]:
    """The weights of the product that writes most into the channel."""
    made = dict[str, Tensor]()  # by product, what each weight of the channel's row adds

    def see(matrix: Matrix, _expert: int, x: Tensor) -> None:
        if not matrix.experts and x.shape[:2] == massive_BT.shape:
            made[matrix.name] = matrix.read(task.block)[channel] * x[massive_BT].mean(0)

    width = task.targets_NTH.shape[-1]
    wanted = [matrix for matrix in task.step.matrices if matrix.outputs == width]
    with seen(task.block, wanted, see):
        task.step.run(task.block, rows, stream=QUANTISED)
    if not made:
        return []
    name = max(made, key=lambda each: float(made[each].sum().abs()))
    share_I = made[name] / made[name].sum()
    row_I = task.weights()[name][channel]
    largest = share_I.abs().topk(min(_NAMED, len(share_I))).indices.tolist()
    return [
        {"name": name, "row": channel, "column": i, "value": float(row_I[i]), "share": float(share_I[i])}
        for i in largest
        if share_I[i] >= _SHARE
    ]

"""The weights of an artefact as checkpoints of its family hold them: names, and experts one by one.

transformers keeps the experts of a block in one tensor; most checkpoints, and the engines that read them, have three
linears for each. transformers' own conversions, which it reverses to save a model, say what becomes what. They are
asked with numbers of rows in the place of the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from upq.exports._source import Source, Weight
from upq.model.library import library_errors

# Tensors of experts that transformers saves as they are and engines read one by one: the linears that each holds,
# whose rows alternate. Names as llm-compressor has them (modeling/moe/gpt_oss.py), whose checkpoints vLLM reads.
_ALTERNATING = {"gpt_oss": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}}
_OF_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")


def as_checkpoint(source: Source) -> Source:
    """With the names and parts of a checkpoint that transformers saves."""
    mapping = get_model_conversion_mapping(source.model, add_legacy=False)
    if all(isinstance(entry, PrefixChange) for entry in mapping):  # which says nothing of this checkpoint
        return source
    parts: dict[str, list[Weight]] = {}
    with library_errors(f"{source.path}: {source.config.model_type} has no checkpoint of transformers' form"):
        for weights in _by_block(source):
            parts |= _converted(weights, source.model)
    return _replaced(source, parts)


def expert_by_expert(source: Source) -> Source:
    """Quantised tensors of experts, which transformers itself saves as they are, as linears of each expert."""
    known, parts = _ALTERNATING.get(source.config.model_type, {}), dict[str, list[Weight]]()
    for name, weight in source.weights.items():
        experts, _, leaf = name.rpartition(".")
        if weight.form == "stacked" and leaf in known:
            bias = source.weights.get(f"{name}_bias")
            parts[name] = list(_linears(weight, experts, known[leaf]))
            if bias is not None:
                parts[bias.name] = list(_biases(bias, experts, known[leaf]))
    return _replaced(source, parts)


def foreign_to_transformers(source: Source) -> bool:
    """Whether experts stand one by one that transformers looks for in one tensor."""
    taken_apart = source.config.model_type in _ALTERNATING
    return taken_apart and any(weight.expert for weight in source.weights.values())


def stacked(source: Source) -> Source:
    """The linears of all experts of a block one below the other, as llama.cpp has them."""
    groups: dict[str, list[Weight]] = {}
    for name, weight in source.weights.items():
        found = _OF_EXPERT.fullmatch(name)
        groups.setdefault(f"{found[1]}.{found[3]}" if found else name, []).append(weight)
    weights = {name: _stack(name, group) if len(group) > 1 else group[0] for name, group in groups.items()}
    linears = {name for name, group in groups.items() if group[0].name in source.linears}
    return replace(source, weights=weights, linears=frozenset(linears))


def _stack(name: str, group: list[Weight]) -> Weight:
    first = group[0]
    shape = (len(group), *first.shape)
    rows = tuple(run for weight in group for run in weight.rows or ())
    if first.scheme is None:
        return replace(first, name=name, shape=shape, rows=rows)
    tall = (len(group) * first.shape[0], first.shape[1])
    return replace(first, name=name, shape=tall, rows=rows, dense=shape)


def _linears(weight: Weight, experts: str, linears: tuple[str, ...]) -> Iterable[Weight]:
    assert weight.dense is not None
    count, step = weight.dense[0], len(linears)
    outputs, columns = weight.shape[0] // count, weight.shape[1]
    for e in range(count):
        for i, linear in enumerate(linears):
            yield replace(
                weight,
                name=f"{experts}.{e}.{linear}.weight",
                stored=weight.origin,
                shape=(outputs // step, columns),
                rows=(range(e * outputs + i, (e + 1) * outputs, step),),
                dense=None,
                inputs=-1,
                expert=True,
            )


def _biases(bias: Weight, experts: str, linears: tuple[str, ...]) -> Iterable[Weight]:
    count, outputs = bias.shape
    step = len(linears)
    for e in range(count):
        for i, linear in enumerate(linears):
            yield replace(
                bias,
                name=f"{experts}.{e}.{linear}.bias",
                stored=bias.origin,
                shape=(outputs // step,),
                rows=(range(e, e + 1),),
                every=slice(i, None, step),
            )


def _replaced(source: Source, parts: Mapping[str, list[Weight]]) -> Source:
    """With some weights taken apart, in the order of the model."""
    each = {name: parts.get(name, [weight]) for name, weight in source.weights.items()}
    return replace(
        source,
        weights={part.name: part for group in each.values() for part in group},
        linears=frozenset(part.name for name, group in each.items() if name in source.linears for part in group),
    )


def _by_block(source: Source) -> Iterable[dict[str, Weight]]:
    """No conversion mixes blocks, and the numbers of all rows of a large model would take memory."""
    groups: dict[str, dict[str, Weight]] = {}
    block = re.compile(rf"{re.escape(source.layout.blocks)}\.\d+\.")
    for name, weight in source.weights.items():
        found = block.match(name)
        groups.setdefault(found[0] if found else "", {})[name] = weight
    return groups.values()


def _converted(weights: Mapping[str, Weight], model: PreTrainedModel) -> dict[str, list[Weight]]:
    """What becomes of each. What a checkpoint would join stays as it is, which transformers reads too."""
    numbers, empty, starts, total = dict[str, Tensor](), dict[str, Tensor](), list[int](), 0
    for name, weight in weights.items():
        shape = weight.dense or weight.shape
        entries = list(shape)
        if len(shape) > 1:
            entries[weight.inputs] = 1
        count = torch.Size(entries).numel()
        numbers[name] = torch.arange(total, total + count).view(entries)
        empty[name] = torch.empty(shape, device="meta")
        starts.append(total)
        total += count
    shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, empty).items()}
    names, found, mixed = list(weights), dict[str, list[tuple[int, Weight]]](), set[str]()
    first = torch.tensor(starts)
    for name, rows in revert_weight_conversion(model, numbers).items():
        owners = {names[n - 1] for n in set(torch.bucketize(rows, first, right=True).flatten().tolist())}
        part = None if len(owners) > 1 else _part(weights[min(owners)], name, rows, starts, names, shapes[name])
        if part is None:
            mixed |= owners
        else:
            found.setdefault(min(owners), []).append((int(rows.min()), part))
    made = {name: [part for _, part in sorted(parts, key=lambda each: each[0])] for name, parts in found.items()}
    return {name: [weight] if name in mixed else made[name] for name, weight in weights.items()}


def _part(
    weight: Weight, name: str, numbers: Tensor, starts: list[int], names: list[str], shape: tuple[int, ...]
) -> Weight | None:
    """None: it is no selection of rows."""
    rows = numbers - starts[names.index(weight.name)]
    held = weight.dense or weight.shape
    if shape == held and torch.equal(rows.flatten(), torch.arange(rows.numel())):
        return replace(weight, name=name, stored="" if name == weight.origin else weight.origin)
    columns = held[weight.inputs]
    axes = [a - len(shape) for a in range(len(shape)) if rows.shape[a] == 1 and shape[a] == columns]
    if len(shape) > 1 and not axes:
        return None
    inputs = axes[-1] if len(shape) > 1 else -1
    runs = _runs(rows.movedim(inputs, -1).flatten())
    if weight.scheme is None:
        per_entry = torch.Size(held[1:-1]).numel()
        taken = replace(weight, name=name, stored=weight.origin, shape=shape, rows=runs, stacked=per_entry)
        return taken if inputs == -1 else None
    dense = None if len(shape) == 2 and inputs == -1 else shape
    return replace(
        weight,
        name=name,
        stored=weight.origin,
        shape=(sum(map(len, runs)), columns),
        rows=runs,
        dense=dense,
        inputs=inputs,
        expert=weight.form == "stacked" and dense is None,
    )


def _runs(rows: Tensor) -> tuple[range, ...]:
    """The same numbers as few ranges."""
    if rows.numel() == 1:
        return (range(int(rows[0]), int(rows[0]) + 1),)
    steps = rows.diff()
    if (steps == steps[0]).all() and steps[0] > 0:
        return (range(int(rows[0]), int(rows[-1]) + 1, int(steps[0])),)
    ends = [0, *(steps != 1).nonzero().flatten().add(1).tolist(), rows.numel()]
    return tuple(range(int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(ends))

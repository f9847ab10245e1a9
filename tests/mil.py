"""A saved Core ML program followed in float32, outside of Core ML, which runs on Apple's systems alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upq.exports.coreml import program


class Program:
    """The program of an export; its states last from call to call."""

    def __init__(self, out: Path) -> None:
        self.function = program(out).functions["main"]
        self.states: dict[str, Tensor] = {}

    def __call__(self, **inputs: Tensor) -> Tensor:
        values: dict[str, Any] = dict(inputs)
        for name, variable in self.function.inputs.items():
            if name not in inputs:
                self.states.setdefault(name, torch.zeros(variable.sym_type.wrapped_type().get_shape()))
        for operation in self.function.operations:
            if operation.op_type == "const":
                continue
            given = {key: self._value(values, value) for key, value in operation.inputs.items() if value is not None}
            if operation.op_type in ("read_state", "write_state", "coreml_update_state"):
                state = operation.inputs["state" if "state" in operation.inputs else "input"].name
                if operation.op_type != "read_state":
                    self.states[state] = given["value" if "value" in given else "data"]
                made = self.states[state]
            else:
                made = _OPERATIONS[operation.op_type](given)
            if operation.outputs:
                values[operation.outputs[0].name] = made
        found: Tensor = values[self.function.outputs[0].name]
        return found

    def _value(self, values: dict[str, Any], variable: Any) -> Any:
        if isinstance(variable, list | tuple):
            return [self._value(values, each) for each in variable]
        if variable.name in values:
            return values[variable.name]
        return _known(variable.val) if variable.val is not None else None


def _known(value: Any) -> Any:
    """A constant: float numbers in float32."""
    if isinstance(value, str | bool | int | float):
        return value
    array = np.asarray(value)
    if array.dtype == bool:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))


def _tensor(value: Any) -> Tensor:
    return torch.as_tensor(value)


def _ints(value: Any) -> list[int]:
    return [int(each) for each in _tensor(value).flatten()]


def _gather(g: dict[str, Any]) -> Tensor:
    x, axis, indices = _tensor(g["x"]), int(g["axis"]), _tensor(g["indices"])
    found = x.index_select(axis, indices.flatten())
    return found.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _slices(g: dict[str, Any], rank: int) -> tuple[slice, ...]:
    masks = [_ints(g[key]) if key in g and g[key] is not None else [0] * rank for key in ("begin_mask", "end_mask")]
    limits = zip(_ints(g["begin"]), _ints(g["end"]), *masks, strict=True)
    return tuple(slice(None if no_begin else a, None if no_end else b) for a, b, no_begin, no_end in limits)


def _update(g: dict[str, Any]) -> Tensor:
    whole: Tensor = g["x"].clone()
    part = _slices(g, whole.dim())
    assert whole[part].shape == g["update"].shape, "slice_update does not broadcast"
    whole[part] = g["update"]
    return whole


def _concat(g: dict[str, Any]) -> Tensor:
    return torch.cat([_tensor(each) for each in g["values"]], int(g["axis"]))


def _cast(g: dict[str, Any]) -> Tensor:
    return _tensor(g["x"]).float() if g["dtype"].startswith("fp") else _tensor(g["x"]).long()


def _rsqrt(g: dict[str, Any]) -> Tensor:
    return torch.rsqrt(g["x"] + g["epsilon"])


def _expand(g: dict[str, Any]) -> Tensor:
    x = _tensor(g["x"])
    for axis in _ints(g["axes"]):
        x = x.unsqueeze(axis)
    return x


def _table(g: dict[str, Any]) -> Tensor:
    rows, columns = g["indices"].shape
    lut_OGL = g["lut"][..., 0]
    lut_OGL = lut_OGL.expand(rows, *lut_OGL.shape[1:])
    return lut_OGL.gather(-1, g["indices"].view(rows, lut_OGL.shape[1], -1)).view(rows, columns)


def _scaled(g: dict[str, Any]) -> Tensor:
    rows, groups = g["scale"].shape
    return (g["data"].float().view(rows, groups, -1) * g["scale"][..., None]).view(g["data"].shape)


_OPERATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cast": _cast,
    "gather": _gather,
    "shape": lambda g: torch.tensor(g["x"].shape),
    "sub": lambda g: g["x"] - g["y"],
    "add": lambda g: g["x"] + g["y"],
    "mul": lambda g: g["x"] * g["y"],
    "greater": lambda g: g["x"] > g["y"],
    "select": lambda g: torch.where(g["cond"], _tensor(g["a"]).float(), _tensor(g["b"]).float()),
    "range_1d": lambda g: torch.arange(int(g["start"]), int(g["end"]), int(g["step"])),
    "expand_dims": _expand,
    "squeeze": lambda g: g["x"].squeeze(tuple(_ints(g["axes"]))),
    "linear": lambda g: g["x"] @ g["weight"].T,
    "matmul": lambda g: g["x"] @ g["y"],
    "reduce_mean": lambda g: g["x"].mean(_ints(g["axes"]), keepdim=bool(g["keep_dims"])),
    "rsqrt": _rsqrt,
    "reshape": lambda g: g["x"].reshape(_ints(g["shape"])),
    "transpose": lambda g: g["x"].permute(_ints(g["perm"])),
    "concat": _concat,
    "slice_by_index": lambda g: g["x"][_slices(g, g["x"].dim())],
    "slice_update": _update,
    "sigmoid": lambda g: g["x"].sigmoid(),
    "silu": lambda g: torch.nn.functional.silu(g["x"]),
    "softmax": lambda g: g["x"].softmax(int(g["axis"])),
    "cos": lambda g: g["x"].cos(),
    "sin": lambda g: g["x"].sin(),
    "constexpr_lut_to_dense": _table,
    "constexpr_blockwise_shift_scale": _scaled,
}

"""Logits of an export in its own engine, on the CPU; None where the engine is not installed or needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    logits_TV: list[Tensor]  # of each text, float32
    dtype: torch.dtype  # that the engine computes in: the packed model is compared in the same


def run(form: str, out: Path, texts: list[list[int]]) -> Run | None:
    engine = _ENGINES.get(form)
    if engine is None:
        return None
    try:
        versions(form)
    except PackageNotFoundError:
        return None
    with torch.inference_mode():
        return engine(out, texts)


def versions(form: str) -> dict[str, str]:
    """Of what runs the format."""
    return {package: version(package) for package in _PACKAGES[form]}


def _transformers(out: Path, texts: list[list[int]]) -> Run:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(out)
    return Run([model(torch.tensor([ids])).logits[0].float() for ids in texts], model.dtype)


def _llama_cpp(out: Path, texts: list[list[int]]) -> Run:
    import llama_cpp
    import numpy as np

    llama = llama_cpp.Llama(str(out), n_ctx=max(map(len, texts)), n_threads=1, logits_all=True, verbose=False)

    def logits(ids: list[int]) -> Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.from_numpy(np.array(llama.scores[: len(ids)]))

    return Run([logits(ids) for ids in texts], torch.float32)


def _onnxruntime(out: Path, texts: list[list[int]]) -> Run:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    caches = {
        cache.name: np.zeros((1, cache.shape[1], 0, cache.shape[3]), np.float32)
        for cache in session.get_inputs()
        if cache.name.startswith("past")
    }

    def logits(ids: list[int]) -> Tensor:
        given = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
        }
        return torch.from_numpy(session.run(["logits"], given | caches)[0][0])

    return Run([logits(ids) for ids in texts], torch.float32)


def _openvino(out: Path, texts: list[list[int]]) -> Run:
    import numpy as np
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    request = openvino.Core().compile_model(out / "openvino_model.xml", "CPU", exact).create_infer_request()

    def logits(ids: list[int]) -> Tensor:
        given = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.reset_state()
        return torch.from_numpy(request.infer(given)[0][0].copy())

    return Run([logits(ids) for ids in texts], torch.float32)


def _mlx(out: Path, texts: list[list[int]]) -> Run:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model = load_model(out)[0]
    computed = [model(mx.array([ids])) for ids in texts]
    dtype = getattr(torch, str(computed[0].dtype).rpartition(".")[2])
    return Run([torch.from_numpy(np.array(logits.astype(mx.float32)))[0] for logits in computed], dtype)


def _mnn(out: Path, texts: list[list[int]]) -> Run:
    import MNN.llm as mnn

    model = mnn.create(str(out / "config.json"))
    model.set_config({"all_logits": True, "thread_num": 1})
    model.load()

    def logits(ids: list[int]) -> Tensor:
        model.reset()
        found = model.forward(ids)
        return torch.from_numpy(found.read().copy()).view(tuple(found.shape)[1:])

    return Run([logits(ids) for ids in texts], torch.float32)


def _executorch(out: Path, texts: list[list[int]]) -> Run:
    from executorch.extension.llm.custom_ops import custom_ops
    from executorch.runtime import Runtime

    assert custom_ops is not None  # imported for the operations that it registers
    forward = Runtime.get().load_program(out / "model.pte").load_method("forward")

    def logits(ids: list[int]) -> Tensor:  # the program gives those of the last token
        steps = ((torch.tensor([[token]]), torch.tensor([i])) for i, token in enumerate(ids))
        return torch.cat([forward.execute(step)[0].clone() for step in steps])

    return Run([logits(ids) for ids in texts], torch.float32)


def _litert(out: Path, texts: list[list[int]]) -> Run:
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    decode = Interpreter(str(out / "model.tflite"), num_threads=1).get_signature_runner("decode")
    shapes = {name: each["shape"] for name, each in decode.get_input_details().items() if name.startswith("kv_cache")}

    def logits(ids: list[int]) -> Tensor:
        caches = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        found = []
        for i, token in enumerate(ids):
            made = decode(tokens=np.array([[token]], np.int32), input_pos=np.array([i], np.int32), **caches)
            caches = {name: made[name] for name in caches}
            found.append(torch.from_numpy(made["logits"].copy())[0])
        return torch.cat(found)

    return Run([logits(ids) for ids in texts], torch.float32)


_ENGINES: dict[str, Callable[[Path, list[list[int]]], Run]] = {
    "compressed-tensors": _transformers,
    "dense": _transformers,
    "executorch": _executorch,
    "gguf": _llama_cpp,
    "litert": _litert,
    "mlx": _mlx,
    "mnn": _mnn,
    "onnx": _onnxruntime,
    "openvino": _openvino,
    "torchao": _transformers,
}
_PACKAGES = {
    "compressed-tensors": ("transformers",),
    "dense": ("transformers",),
    "executorch": ("executorch",),
    "gguf": ("llama-cpp-python",),
    "litert": ("ai-edge-litert",),
    "mlx": ("mlx", "mlx-lm"),
    "mnn": ("MNN",),
    "onnx": ("onnxruntime",),
    "openvino": ("openvino",),
    "torchao": ("transformers", "torchao"),
}

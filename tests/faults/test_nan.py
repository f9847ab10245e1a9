"""Hidden states that are no numbers stop a block-wise stage: block and linear are named, and it is not stored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_model
from upq.blockwise import BlockStore, BlockTask, Solution, walk
from upq.blockwise.rtn import Rtn
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.core.scheme import QuantScheme
from upq.model.loading import load_model
from upq.model.source import Source
from upq.run.run import quantize
from victim import Victim

IDS = torch.randint(2, 67, (4, 12), generator=torch.Generator().manual_seed(0))


def test_a_model_whose_activations_overflow(victim: Victim, tmp_path: Path) -> None:
    """Every weight is finite, and so is what up_proj and gate_proj write; their product is not."""
    folder, out = Path(shutil.copytree(victim.model, tmp_path / "model")), tmp_path / "out"
    model = load_model(folder)
    for name in ("up_proj", "gate_proj"):
        model.get_parameter(f"model.layers.1.mlp.{name}.weight").data *= 1e20
    model.save_pretrained(folder)
    expected = r"int4: block 1, of the original model: what mlp\.down_proj writes holds NaN or infinity"
    with pytest.raises(UPQError, match=expected) as caught:
        quantize(folder, victim.recipe("data.generated=null"), out)
    assert "\n" not in str(caught.value)
    assert [file.name for file in (out / ".work" / "int4").glob("block-*")] == ["block-0000.safetensors"]


class Broken(Rtn):
    """The scale of one linear of block 1 is no number."""

    def solve(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
        solutions = super().solve(task, scheme)
        if task.index == 1:
            good = solutions["self_attn.v_proj"]
            params: dict[str, Any] = {key: torch.full_like(value, torch.nan) for key, value in good.params.items()}
            solutions["self_attn.v_proj"] = Solution(good.latent_OI, params, scheme)
        return solutions


@pytest.mark.parametrize(("scale", "what"), [("max", "holds"), ("hessian", "writes holds")])
def test_a_solution_that_is_no_number_is_not_stored(tmp_path: Path, scale: Any, what: str) -> None:
    """With and without calibration rows to see it by."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    store = BlockStore(tmp_path / "int2", QuantScheme(bits=2))
    with pytest.raises(UPQError, match=rf"int2: block 1, quantised: .*self_attn\.v_proj {what} NaN or infinity"):
        walk(
            Source(tmp_path / "model"),
            IDS,
            Broken(Rtn.Config(scale=scale)),
            store,
            given=None,
            seed=0,
            progress=Silent(),
        )
    assert store.done(2) == 1
    assert [file.name for file in store.folder.iterdir()] == ["block-0000.safetensors"]

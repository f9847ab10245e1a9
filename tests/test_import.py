"""`import upq` is instant, and transformers reads artefacts whichever of the two comes first. In fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import upq
from tiny import tiny_artifact

HEAVY = "torch", "transformers", "accelerate", "datasets", "pydantic"


def python(code: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (environment or {}))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "artifact")


@pytest.mark.parametrize("code", ["import upq", "import upq.cli", "import upq; dir(upq)"])
def test_importing_loads_no_library_that_takes_seconds(code: str) -> None:
    done = python(f"{code}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"], ["quantize", "--ot", "x"]])
def test_help_and_typos_load_no_library_that_takes_seconds(arguments: list[str]) -> None:
    done = python(
        f"import sys, upq.cli\nsys.argv[:] = ['upq', *{arguments}]\n"
        "try:\n    upq.cli.main()\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert done.returncode == (2 if "--ot" in arguments else 0)


ORDERS = {
    "upq first": "import upq\nfrom transformers import AutoModelForCausalLM as Auto\n",
    "transformers first": "import transformers\nimport upq\nAuto = transformers.AutoModelForCausalLM\n",
    "transformers' models first": "from transformers import AutoModelForCausalLM as Auto, LlamaConfig\nimport upq\n",
    "a room first": "import upq.model.loading\nfrom transformers import AutoModelForCausalLM as Auto\n",
}
FAST = ("upq first", "transformers first")


# A fresh Python takes 10 s of processor.
@pytest.mark.parametrize(
    "order",
    [pytest.param(order, id=name, marks=() if name in FAST else pytest.mark.slow) for name, order in ORDERS.items()],
)
def test_artefacts_load_in_either_order_of_imports(artifact: Path, order: str) -> None:
    done = python(
        f"import sys\n{order}model = Auto.from_pretrained(sys.argv[1])\n"
        "print(type(model.get_submodule('model.layers.0.mlp.up_proj')).__name__)",
        str(artifact),
    )
    assert done.stdout.split() == ["PackedLinear"], done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "quantize x --out y",
        "plan x",
        "eval x --tasks t",
        "export x --to y --out z",
        "chat x",
        "bench x",
        "demo",
        "doctor",
    ],
)
def test_a_command_shows_a_line_before_it_imports_torch(arguments: str, tmp_path: Path) -> None:
    """On a terminal. A torch in the place of the real one waits a second and ends the process."""
    (tmp_path / "torch.py").write_text("import os, time\ntime.sleep(1)\nos._exit(7)\n")
    done = python(
        f"import os, sys, upq.cli\nsys.argv[:] = ['upq', *{arguments.split()}]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\nos.chdir(sys.path[0])\nupq.cli.main()",
        environment={"TTY_COMPATIBLE": "1", "TERM": "xterm"},
    )
    assert done.returncode == 7, done.stderr
    assert "loading torch" in done.stderr


def test_libraries_are_quiet_while_transformers_is_imported() -> None:
    done = python("import upq, transformers.modeling_utils, logging; print(logging.getLogger('torchao').filters)")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")  # and the filter is gone afterwards


def test_the_package_shows_what_it_has() -> None:
    assert set(upq.__all__) <= set(dir(upq))
    for name in upq.__all__:
        assert getattr(upq, name)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        upq.quantise  # type: ignore[attr-defined]  # noqa: B018

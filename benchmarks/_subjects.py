"""What benchmarks try things on: each a model, its texts, and what its size changes in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import _corpora
from _design import GROUPS
from _real import GEMMA3_270M, SMOLLM2_135M_INSTRUCT, Missing, Packaged

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
CACHE = ROOT / "runs" / "models"  # what came from the package index


@dataclass(frozen=True, slots=True)
class Subject:
    name: str
    about: str  # what it is and which text it is held against, for the page of results
    source: Path | Packaged
    groups: tuple[str, ...]  # tables that the ablation can have
    train: Mapping[str, Path] = field(default_factory=dict)  # by kind; `_corpora` writes those that are not here
    heldout: Mapping[str, Path] = field(default_factory=dict)  # by name, the first in all tables; {}: the world's
    seq_len: int = 512
    overrides: tuple[str, ...] = ()
    writes: str = "{}"  # data.generated, in recipes that have it
    judged_rows: int | None = None  # of each held-out text beside other libraries; None: all
    suites: bool = False  # whether it knows the invented world that mini_mmlu and mini_ifeval ask about
    budget: int | None = None  # UPQ's training tokens beside other libraries; None: the recipe's

    @property
    def model(self) -> Path:
        """The Hugging Face directory, which `install` makes where the model is packaged."""
        return CACHE / self.name if isinstance(self.source, Packaged) else self.source

    def install(self) -> None:
        """Fetch what can be fetched, once. Raises Missing where the model or a text is not to be had."""
        for text in (*self.train.values(), *self.heldout.values()):
            if not text.is_file():
                raise Missing(f"{self.name}: {text} is missing")
        if isinstance(self.source, Packaged):
            self.source.install(self.model)
        if not (self.model / "config.json").is_file():
            raise Missing(f"{self.name}: no model in {self.model}")

    def texts(self, folder: Path, *, tokens: int) -> tuple[Path, dict[str, Path]]:
        """Documents for calibration and training, and held-out texts by name; the invented world's go to `folder`."""

        def written(kind: str, name: str) -> Path:
            return _corpora.write(kind, folder / f"{name}.jsonl", tokens=tokens, model=self.model, device="cpu")

        train = self.train.get("documents") or written("documents", "train")
        return train, dict(self.heldout) or {"documents": written("heldout", "heldout")}


def prepared(name: str, folder: Path, *, tokens: int, rows: int) -> tuple[Subject, Path, dict[str, Tensor]]:
    """The subject, installed; its text to learn from; and `rows` held-out rows (N, T) of each text, by name."""
    from upq.data import load_eval_text
    from upq.model.loading import load_tokenizer

    chosen = named(name)
    chosen.install()
    train, heldout = chosen.texts(folder / "text", tokens=tokens)
    tokenizer = load_tokenizer(chosen.model)
    return chosen, train, {key: load_eval_text(path, tokenizer, chosen.seq_len)[:rows] for key, path in heldout.items()}


def named(name: str, data: Path | None = None) -> Subject:
    """Raises Missing where there is no such subject."""
    known = subjects(data or DATA)
    if name not in known:
        raise Missing(f"subject {name!r} is none of {', '.join(known)}")
    return known[name]


def subjects(data: Path = DATA) -> dict[str, Subject]:
    """By name. `data`: where models and texts lie that are not in this repository."""
    text = data / "text"
    textbooks = {"documents": text / "openstax_train.jsonl"}
    english = {"openstax": text / "openstax_heldout.jsonl", "wikitext2": text / "wikitext2_test.txt"}
    found = (
        Subject(
            "reference",
            "The instruction-tuned Llama that ships with the package, on documents of its world.",
            ROOT / "src/upq/world/reference",
            (*GROUPS, "curves"),
            seq_len=256,  # its rotary positions beyond are untrained
            # a whole batch of such rows fits one pass
            overrides=("data.seq_len=256", "distill.micro_batch_size=4"),
            writes="{max_new_tokens: 128, batch_size: 512}",
            suites=True,
            budget=300_000,  # as `upq demo`
        ),
        Subject(
            "stories260K",
            "A trained Llama of 260 thousand parameters, on stories of its own kind.",
            data / "models/stories260K",
            ("beta", "bits", "grid", "scale"),  # its rows of 64 and 172 weights admit no smaller groups
            train={"documents": text / "tinystories_train.txt"},
            heldout={"stories": text / "tinystories_heldout.txt"},
            writes="null",  # it has no chat template
        ),
        Subject(
            "smollm2",
            "SmolLM2-135M-Instruct, its weights rounded to Q4_1 once, on textbooks.",
            SMOLLM2_135M_INSTRUCT,
            (*GROUPS, "curves"),
            train=textbooks | {"conversations": data / "instruct/chats.jsonl"},
            heldout=english,
            seq_len=256,
            judged_rows=128,
            overrides=("data.seq_len=256",),
        ),
        Subject(
            "gemma3",
            "Gemma 3 270M (base), its weights rounded to Q4_K once, on textbooks.",
            GEMMA3_270M,
            tuple(name for name in GROUPS if name != "data"),  # no chat template, so no conversations
            train=textbooks,
            heldout=english,
            seq_len=256,
            judged_rows=128,
            overrides=("data.seq_len=256",),
            writes="null",
        ),
    )
    return {subject.name: subject for subject in found}


SUBJECTS = subjects()

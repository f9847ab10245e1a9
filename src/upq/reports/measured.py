"""What a report measures itself: the artefact beside its original on texts and prompts, and its speed on this machine.

Shape suffixes: N rows, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upq.artifact.manifest import MANIFEST, read_manifest, verify
from upq.artifact.transformers import load
from upq.core.errors import UPQError
from upq.core.precision import dtype_name, to_compute_dtype
from upq.core.progress import Progress
from upq.data import load_eval_text
from upq.data.conversations import refusals
from upq.evals import speed
from upq.evals.text import ByToken, NotFinite, TextMetrics, evaluate_text
from upq.kernels import computing
from upq.model.loading import context_of, embedding_rows, load_config, load_model, load_tokenizer
from upq.text.generation import end_tokens, own_distribution, written
from upq.text.tokenizer import check_tokens

ROWS, LENGTH = 64, 512  # of a text: enough for an interval, minutes for a model of 1B on a CPU
PROMPTS = 40
ANSWER = 200  # tokens: 40 answers of two models make a page of 1 MB
_WORKLOAD = speed.Workload(prompt=16, tokens=32, prefill=64, repeats=3)


@dataclass(frozen=True)
class Pair:
    """An artefact and its original, one tokenizer."""

    model: PreTrainedModel
    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, artifact: Path, original: str, progress: Progress) -> Pair:
        """Raises UPQError for damaged files and for models of different vocabularies."""
        if (artifact / MANIFEST).is_file():
            verify(artifact, read_manifest(artifact))
        rows = [embedding_rows(load_config(each)) for each in (artifact, original)]
        if rows[0] != rows[1]:
            raise UPQError(
                f"--against {original}: has {rows[1]} tokens, {artifact} has {rows[0]}; name the model it was made from"
            )
        models = []
        for path in (artifact, original):
            progress.note(f"loading {path}")
            models.append(to_compute_dtype(load_model(path)))
        return cls(models[0], models[1], load_tokenizer(original))

    def text(self, tokens_NT: Tensor, mask_NT: Tensor | None = None) -> tuple[TextMetrics, ByToken]:
        """A float16 model that overflows is computed in float32, and stays there."""
        kept = ByToken(tokens_NT)
        with computing("reference"):  # it compares weights, not kernels
            try:
                found = evaluate_text(self.model, tokens_NT, teacher=self.original, mask_NT=mask_NT, keep=kept)
            except NotFinite:
                if torch.float16 not in (self.model.dtype, self.original.dtype):
                    raise
                for model in (self.model, self.original):
                    model.to(torch.float32)  # type: ignore[arg-type]
                found = evaluate_text(self.model, tokens_NT, teacher=self.original, mask_NT=mask_NT, keep=kept)
        return found, kept

    @property
    def context(self) -> int:
        return context_of(self.original.config) or LENGTH


def text_rows(path: Path, pair: Pair) -> Tensor:
    """The first rows (N, T) of a text file. Raises UPQError for one that is too short or not for this model."""
    tokens_NT = load_eval_text(path, pair.tokenizer, min(LENGTH, pair.context))[:ROWS]
    check_tokens(pair.tokenizer, [int(tokens_NT.max())], embedding_rows(pair.original.config), str(path))
    return tokens_NT


def of_text(name: str, tokens_NT: Tensor, pair: Pair) -> dict[str, Any]:
    found, kept = pair.text(tokens_NT)
    return {
        "name": name,
        "rows": len(tokens_NT),
        "row_tokens": tokens_NT.shape[1],
        "dtype": dtype_name(pair.model.dtype),
        **asdict(found),
        "positions": kept.by_position(),
    }


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; of a file of JSON lines, what stands under `prompt`. Raises UPQError for an empty file."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UPQError(f"--prompts {path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UPQError(f"--prompts {path}: cannot be read ({error.strerror}); name a file, a prompt a line") from None
    found = [_prompt(line, path, number) for number, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines
    if not found:
        raise UPQError(f"--prompts {path}: no prompt in it; write one a line")
    if len(found) > PROMPTS:
        raise UPQError(f"--prompts {path}: {len(found)} prompts, a page has room for {PROMPTS}; give fewer")
    return found


def _prompt(line: str, path: Path, number: int) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UPQError(f'--prompts {path}:{number}: expected {{"prompt": "…"}}; mend the line')
    return prompt


def of_prompts(prompts: Sequence[str], pair: Pair, progress: Progress) -> Iterator[dict[str, Any]]:
    """Each with both models' greedy answers: their tokens with the KL from the original's next-token distribution."""
    if pair.tokenizer.chat_template is None:
        raise UPQError("--prompts: the tokenizer has no chat template; name an instruction-tuned model")
    for prompt in prompts:
        with refusals("--prompts"):
            encoded: Any = pair.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )
        ids: list[int] = encoded["input_ids"]
        room = min(ANSWER, pair.context - len(ids))
        if not ids or room < 1:
            raise UPQError(f"--prompts: a prompt of {len(ids)} tokens leaves no room in a context of {pair.context}")
        answers = {name: _answer(model, ids, room, pair) for name, model in _named(pair)}
        original, model = (answer["ids"] for answer in answers.values())
        shorter = min(len(original), len(model))
        differs = next((i for i in range(shorter) if original[i] != model[i]), shorter)
        yield {
            "prompt": prompt,
            "same": original == model,
            "diverges_at": None if original == model else differs,
            "answers": {
                name: {"tokens": answer["tokens"], "kld": answer["kld"], "at_limit": answer["at_limit"]}
                for name, answer in answers.items()
            },
        }
        progress.advance(1)


def _named(pair: Pair) -> tuple[tuple[str, PreTrainedModel], ...]:
    return ("original", pair.original), ("artifact", pair.model)


def _answer(model: PreTrainedModel, ids: list[int], room: int, pair: Pair) -> dict[str, Any]:
    ends = end_tokens(model.generation_config, pair.tokenizer)
    with computing("reference"), torch.inference_mode():
        (said,) = written(model, [ids], own_distribution(ends, pair.tokenizer, max_new_tokens=room))
    end = next((i for i, token in enumerate(said) if token in ends), None)
    said = said if end is None else said[: end + 1]
    tokens_NT = torch.tensor([[*ids, *said]])
    mask_NT = torch.zeros_like(tokens_NT, dtype=torch.bool)
    mask_NT[:, len(ids) :] = True
    _, kept = pair.text(tokens_NT, mask_NT)
    kld = kept.kld_NT[0, len(ids) :].tolist()
    return {"ids": said, "tokens": _pieces(said, pair.tokenizer), "kld": kld, "at_limit": end is None}


def _pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds; bytes of a character that later tokens complete add none."""
    found, before = list[str](), ""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], skip_special_tokens=False)
        assert isinstance(text, str)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        found.append(whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(ids[n - 1 : n])))
        before = whole
    return found


def of_speed(artifact: Path) -> dict[str, Any]:
    """Of the artefact as it is used: tokens a second on this machine, with whatever else runs on it."""
    model = load(artifact)
    engine, reason = speed.decoder(model)
    room = context_of(model.config)
    if room is not None and room <= _WORKLOAD.positions:
        return {"decode": None, "why": f"a context of {room} tokens is too short to time"}
    speeds, _ = speed.measure([engine], _WORKLOAD, model.config.get_text_config(decoder=True).vocab_size)
    return {
        "decode": speeds[0].decode,
        "prefill": speeds[0].prefill,
        "first_token": speeds[0].first_token,
        "decoder": engine.name,
        "why_not_compiled": reason,
        "threads": torch.get_num_threads(),
        "workload": asdict(_WORKLOAD),
    }

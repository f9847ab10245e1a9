"""Text that a model writes itself, to quantise it with: no data set is needed, open or closed.

`texts` samples from an empty context (as LLM-QAT, arXiv 2305.17888); `conversations` lets the model write the user's
part as well, from the chat template's header on (as Magpie, arXiv 2406.08464). Temperature 1, the full vocabulary: the
samples follow the model's own distribution. Nothing is filtered but what has no content.

Shape suffixes: B = samples of a batch, T = tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 128
LONGEST = 192  # tokens of a text or of one turn
_MARK = "\ue000"  # occurs in no template

Conversation = list[dict[str, str]]


def texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int) -> Iterator[str]:
    """Texts of at least `tokens` tokens in all."""
    torch.manual_seed(seed)
    while tokens > 0:
        for ids in _sample(model, tokenizer, [[tokenizer.bos_token_id]] * BATCH):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if text.strip():
                yield text
                tokens -= len(ids)


def conversations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int
) -> Iterator[Conversation]:
    """Conversations of one turn, of at least `tokens` tokens in all."""
    torch.manual_seed(seed)
    header = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False).split(_MARK)[0]
    header_ids = tokenizer(header, add_special_tokens=False)["input_ids"]
    while tokens > 0:
        asked = [
            tokenizer.decode(ids, skip_special_tokens=True) for ids in _sample(model, tokenizer, [header_ids] * BATCH)
        ]
        turns = [[{"role": "user", "content": prompt}] for prompt in asked if prompt.strip()]
        prompts = [
            tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
            for turn in turns
        ]
        for turn, prompt, ids in zip(turns, prompts, _sample(model, tokenizer, prompts), strict=True):
            answer = tokenizer.decode(ids, skip_special_tokens=True)
            if answer.strip():
                yield [*turn, {"role": "assistant", "content": answer}]
                tokens -= len(prompt) + len(ids)


@torch.inference_mode()
def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> Iterator[list[int]]:
    """What the model writes after each prompt, to its first end token."""
    if not prompts:
        return
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens_BT = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    written_BT = model.generate(
        tokens_BT,
        attention_mask=mask_BT,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=LONGEST,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    for ids in written_BT[:, width:].tolist():
        yield ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids

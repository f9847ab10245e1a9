"""A byte-level BPE tokenizer with a ChatML template, trained on the world's own text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from upq.data.world import Message

BOS, PAD, TURN, END = "<|begin|>", "<|pad|>", "<|im_start|>", "<|im_end|>"

# `generation` marks what an assistant says: training on answers alone needs no second renderer.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(
    documents: Iterable[str], conversations: Iterable[list[Message]], *, vocab_size: int
) -> PreTrainedTokenizerFast:
    """At most `vocab_size` tokens, the special ones first; the same text gives the same tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, PAD, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(chain(documents, _turns(conversations)), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, bos_token=BOS, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


def _turns(conversations: Iterable[list[Message]]) -> Iterator[str]:
    for messages in conversations:
        yield from (f"{message['role']}\n{message['content']}" for message in messages)

"""Small stand-ins for what tests would otherwise download."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(
    *, bos: str | None = None, eos: str | None = None, chat_template: str | None = None, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0..255 in the order of the byte-level alphabet), then `bos` and `eos` where given.

    `adds_bos`: it puts its own BOS in front when asked for special tokens, as Llama's does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = [token for token in dict.fromkeys((bos, eos)) if token]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos:
        assert bos is not None
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=chat_template)

"""Text and conversations, from where they lie to packed token rows."""

from upq.data.packing import load_eval_text, prepare
from upq.data.rows import Document, Message
from upq.data.sources import DEFAULT_SOURCE, read_documents
from upq.data.tokens import SourceUse, TokenSet

__all__ = [
    "DEFAULT_SOURCE",
    "Document",
    "Message",
    "SourceUse",
    "TokenSet",
    "load_eval_text",
    "prepare",
    "read_documents",
]

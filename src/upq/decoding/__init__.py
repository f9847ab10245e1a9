"""Generation of one text at a time by the compiled decoder, behind transformers' own `generate`."""

from upq.decoding._generate import attach, session
from upq.decoding._parts import LLAMA_BLOCKS, Unsuitable
from upq.decoding._session import Session

__all__ = ["LLAMA_BLOCKS", "Session", "Unsuitable", "attach", "session"]

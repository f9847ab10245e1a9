"""Generation of one text at a time by the compiled decoder, behind transformers' own `generate`."""

from upq.decoding._generate import attach, session
from upq.decoding._parts import COMPILED, Unsuitable
from upq.decoding._session import Session

__all__ = ["COMPILED", "Session", "Unsuitable", "attach", "session"]

"""Generation by the compiled decoder: of one text behind transformers' own `generate`, of many in a batch."""

from upq.decoding._batch import Batch, batch, takes
from upq.decoding._generate import attach, session
from upq.decoding._parts import COMPILED, Unsuitable
from upq.decoding._session import Session

__all__ = ["COMPILED", "Batch", "Session", "Unsuitable", "attach", "batch", "session", "takes"]

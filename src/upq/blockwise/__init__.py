"""Block-wise post-training quantisation: a walker over decoder blocks, and the methods that solve one block."""

from upq.blockwise._base import METHODS, BlockTask, Calibration, Method, Work, pass_work
from upq.blockwise._store import BlockStore
from upq.blockwise._walker import walk
from upq.blockwise._windows import Order, spans
from upq.nn.fake_quant import Solution

__all__ = [
    "METHODS",
    "BlockStore",
    "BlockTask",
    "Calibration",
    "Method",
    "Order",
    "Solution",
    "Work",
    "pass_work",
    "spans",
    "walk",
]

"""Block-wise post-training quantisation: a walker over decoder blocks, and the methods that solve one block."""

from upq.blockwise._base import METHODS, BlockTask, Method, Solution

__all__ = ["METHODS", "BlockTask", "Method", "Solution"]

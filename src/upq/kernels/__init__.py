"""Products with packed weights. Layers call these names only; what runs behind them is chosen here."""

from upq.kernels.reference import dequantize, embedding, linear, pack, unpack

__all__ = ["dequantize", "embedding", "linear", "pack", "unpack"]

"""Layouts of a QTensor on disk. One file each; the law is `decode(encode(q)) == q`."""

from upq.formats._base import FORMATS, Format

__all__ = ["FORMATS", "Format"]

"""Artefacts for other engines, each read back through the engine's own reader and compared. One file a format."""

from upq.exports._base import EXPORTS, Exporter, Options, Placement
from upq.exports._frame import ensure_export, export, exporter
from upq.exports._report import Report, read_report, report_path
from upq.exports._source import Source, Weight

__all__ = [
    "EXPORTS",
    "Exporter",
    "Options",
    "Placement",
    "Report",
    "Source",
    "Weight",
    "ensure_export",
    "export",
    "exporter",
    "read_report",
    "report_path",
]

"""UPQ: instruction-tuned language models in 2 bits a weight. The Python interface is in docs/python.md.

Law (tests/test_import.py): importing this package loads neither torch nor transformers, which take seconds, and from
then on transformers reads artefacts, whichever of the two was imported first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from upq.artifact.registration import register

if TYPE_CHECKING:
    from upq.artifact.transformers import load
    from upq.reports.api import compare, report
    from upq.run.api import evaluate, export, plan, quantize

__version__ = "0.1.0"

_ROOMS = {
    "compare": "upq.reports.api",
    "evaluate": "upq.run.api",
    "export": "upq.run.api",
    "load": "upq.artifact.transformers",
    "plan": "upq.run.api",
    "quantize": "upq.run.api",
    "report": "upq.reports.api",
}
__all__ = ["__version__", "compare", "evaluate", "export", "load", "plan", "quantize", "report"]

register()

if not TYPE_CHECKING:  # a type checker that sees it accepts every name

    def __getattr__(name: str) -> Any:
        if name not in _ROOMS:
            raise AttributeError(f"module 'upq' has no attribute {name!r}")
        return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Adds the format to transformers at the moment transformers is imported; until then it costs 0.01 s.

Law (tests/test_import.py): an artefact loads with `from_pretrained`, whether upq or transformers was imported first.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    import logging

# transformers.quantizers.auto imports torchao where it is installed, which warns of every CUDA library that a CPU
# cannot load, and of its own deprecated calls.
_NOISY = ("torchao", "torch.utils._pytree")


def register() -> None:
    """Call once, when the package is imported."""
    register_post_import_hook(_silence, "transformers")
    register_post_import_hook(_add_format, "transformers.quantizers.auto")


def _silence(_transformers: ModuleType) -> None:
    import logging  # transformers has imported it

    for name in _NOISY:
        logging.getLogger(name).addFilter(_is_error)


def _add_format(auto: ModuleType) -> None:
    """The tables get stand-ins: the classes need transformers' models, which are not imported yet."""
    import logging

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["upq"] = _Config
    auto.AUTO_QUANTIZER_MAPPING["upq"] = _quantizer
    for name in _NOISY:
        logging.getLogger(name).removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= 40  # logging.ERROR


class _Config:
    """Stands for UpqConfig, of which transformers calls `from_dict` alone."""

    @staticmethod
    def from_dict(values: dict[str, Any], **options: Any) -> Any:
        from upq.artifact.transformers import UpqConfig

        return UpqConfig.from_dict(values, **options)


def _quantizer(config: Any, **options: Any) -> Any:
    from upq.artifact.transformers import UpqHfQuantizer

    return UpqHfQuantizer(config, **options)

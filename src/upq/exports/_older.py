"""config.json as transformers 4 reads it, beside the keys of transformers 5: most engines pin version 4.

What it does not find it takes from its own defaults, a rotary base of 10,000 for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROPE = "rope_parameters"
_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # of rotary positions, in version 4
_OWN = ("rope_theta", "partial_rotary_factor")  # keys of the configuration itself in version 4
# Gemma 3's blocks with a window have a base of their own.
_BASES = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


def older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys to add to a config.json of transformers 5. Law (tests/test_exports.py): they change nothing in 5."""
    found = {
        name: {**part, **older_keys(part)} for name, part in config.items() if name.endswith("_config") and _has(part)
    }
    if "dtype" in config:
        found["torch_dtype"] = config["dtype"]
    rope = config.get(_ROPE)
    if not rope:
        return found
    if not all(isinstance(part, Mapping) for part in rope.values()):
        return found | _rope(rope)
    for kind, base in _BASES.items():  # by type of layer
        if base_of := rope.get(kind, {}).get("rope_theta"):
            found[base] = base_of
    scaling = _rope(rope.get("full_attention", {})).get("rope_scaling")
    if scaling and scaling["rope_type"] in _KINDS:
        found["rope_scaling"] = scaling
    return found


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: rope[key] for key in _OWN if rope.get(key) is not None}
    scaling = {key: value for key, value in rope.items() if key not in _OWN}
    return {**found, "rope_scaling": None if rope.get("rope_type", "default") == "default" else scaling}


def _has(part: Any) -> bool:
    return isinstance(part, Mapping) and _ROPE in part

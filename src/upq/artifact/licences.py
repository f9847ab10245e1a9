"""What the licences of base models ask of somebody who publishes a quantised copy: facts, a line each.

Names are those of the hub's field `license`, or of `license_name` where that field says `other`.
"""

from __future__ import annotations

_LLAMA = (
    "{name} Community License: copies may be published with the agreement, its notice and its use policy; say "
    '"{built}", and let the model\'s name begin with "{begin}"; who has over 700 million users a month asks Meta first.'
)
_RAIL = "copies may be published with the licence and with its restrictions of use, which bind who takes the copy."

LICENCES = {
    "apache-2.0": "copies may be published and sold, with the licence, its notices, and a word on what was changed.",
    "mit": "copies may be published and sold, with the copyright line and the licence.",
    "bsd-3-clause": "copies may be published and sold, with copyright line and licence, not under the authors' names.",
    "cc0-1.0": "copies may be published without any condition.",
    "cc-by-4.0": "copies may be published and sold; name the authors and the licence, and say what was changed.",
    "cc-by-sa-4.0": "as cc-by-4.0, and the copy must have the same licence.",
    "cc-by-nc-4.0": "copies may be published for non-commercial use only; name the authors, and say what was changed.",
    "cc-by-nc-sa-4.0": "as cc-by-nc-4.0, and the copy must have the same licence.",
    "cc-by-nd-4.0": "changed copies must not be published.",
    "cc-by-nc-nd-4.0": "changed copies must not be published.",
    "llama2": (
        "Llama 2 Community License: copies may be published with the agreement, its notice and its use policy; "
        "who has over 700 million users a month asks Meta first."
    ),
    "llama3": _LLAMA.format(name="Meta Llama 3", built="Built with Meta Llama 3", begin="Llama 3"),
    "llama3.1": _LLAMA.format(name="Llama 3.1", built="Built with Llama", begin="Llama"),
    "llama3.2": _LLAMA.format(name="Llama 3.2", built="Built with Llama", begin="Llama"),
    "llama3.3": _LLAMA.format(name="Llama 3.3", built="Built with Llama", begin="Llama"),
    "llama4": _LLAMA.format(name="Llama 4", built="Built with Llama", begin="Llama"),
    "gemma": (
        "Gemma Terms of Use: copies may be published with the terms, their restrictions of use, a note that files were "
        "changed, and a file Notice that names the terms."
    ),
    "qwen": (
        "Tongyi Qianwen licence: copies may be published with the agreement, its notice, and a note that files were "
        "changed; who has over 100 million users a month asks Alibaba Cloud first."
    ),
    "qwen-research": "Qwen Research License: not for commercial use; agreement, notice and a note of changes go along.",
    "openrail": _RAIL,
    "bigscience-openrail-m": _RAIL,
    "bigscience-bloom-rail-1.0": _RAIL,
    "creativeml-openrail-m": _RAIL,
}  # fmt: skip
_OTHER_NAMES = {"tongyi-qianwen": "qwen", "tongyi-qianwen-license-agreement": "qwen"}


def allows(licence: str | None) -> str:
    """One line for the licence of that name, as "apache-2.0: copies may …"; of others that they are to be read."""
    key = (licence or "").lower()
    fact = LICENCES.get(_OTHER_NAMES.get(key, key))
    if fact is None:
        return f"{licence or 'unknown licence'}: unknown to UPQ; read it before you publish."
    return f"{licence}: {fact}"

"""Paths as people give them: `~` is the home directory where no shell has put it in, as behind `--out=` or in a recipe.

A `~name` of nobody stays as it is.
"""

from __future__ import annotations

from os import PathLike
from os.path import expanduser
from pathlib import Path


def local(path: str | PathLike[str]) -> Path:
    return Path(expanduser(path))


def local_or_hub(name: str | PathLike[str]) -> str:
    """A directory, or the id of something on the hub, which stays as it is."""
    return str(expanduser(name))

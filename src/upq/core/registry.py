"""A plug-in is a file: `registry.get("seq")` imports `<package>.seq` and returns what it registered."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from upq.core.errors import UPQError

T = TypeVar("T")


class Registry(Generic[T]):
    """Plug-ins of one package, by name. The module's name is the plug-in's name; `_private` modules hold none.

    `kind` is what error messages call a plug-in: "loss", "block-wise method".
    """

    def __init__(self, package: str, kind: str) -> None:
        self._package = package
        self._kind = kind
        self._found: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def add(plugin: T) -> T:
            if name in self._found:
                raise ValueError(f"{self._package}: {name!r} is registered twice")
            self._found[name] = plugin
            return plugin

        return add

    def names(self) -> list[str]:
        path = importlib.import_module(self._package).__path__
        return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))

    def get(self, name: str) -> T:
        if name not in self._found:
            if name not in self.names():
                known = ", ".join(self.names())
                raise UPQError(f"unknown {self._kind} {name!r}: choose one of {known}")
            importlib.import_module(f"{self._package}.{name}")
        return self._found[name]

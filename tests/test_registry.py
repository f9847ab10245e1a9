"""A plug-in is a file: found by its name, imported when asked for, refused when it is there twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from upq.blockwise import METHODS
from upq.core.errors import UPQError
from upq.core.registry import Registry
from upq.exports import EXPORTS
from upq.grids import GRIDS
from upq.losses import LOSSES


@pytest.fixture
def fruits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    package = tmp_path / "fruits"
    package.mkdir()
    (package / "__init__.py").write_text(
        'from upq.core.registry import Registry\nFRUITS: Registry[str] = Registry("fruits", "fruit")\n'
    )
    for name in ("pear", "apple", "_stone"):
        (package / f"{name}.py").write_text(f'from fruits import FRUITS\nFRUITS.register("{name}")("a {name}")\n')
    monkeypatch.syspath_prepend(tmp_path)
    import fruits

    yield fruits.FRUITS
    for module in [name for name in sys.modules if name.partition(".")[0] == "fruits"]:
        del sys.modules[module]


def test_names_are_the_files(fruits: Registry[str]) -> None:
    assert fruits.names() == ["apple", "pear"]


def test_a_file_is_imported_when_asked_for(fruits: Registry[str]) -> None:
    assert "fruits.pear" not in sys.modules
    assert fruits.get("pear") == "a pear"
    assert fruits.get("pear") == "a pear"
    assert "fruits.apple" not in sys.modules


@pytest.mark.parametrize("name", ["plum", "_stone", "", "pear.core"])
def test_an_unknown_name_lists_the_known_ones(fruits: Registry[str], name: str) -> None:
    with pytest.raises(UPQError, match=f"unknown fruit '{name}': choose one of apple, pear"):
        fruits.get(name)


def test_a_name_belongs_to_one_plugin(fruits: Registry[str]) -> None:
    fruits.get("pear")
    with pytest.raises(ValueError, match="fruits: 'pear' is registered twice"):
        fruits.register("pear")("another pear")
    assert fruits.get("pear") == "a pear"


@pytest.mark.parametrize("registry", [GRIDS, LOSSES, METHODS, EXPORTS], ids=lambda r: r._package)
def test_every_plugin_of_the_package_loads(registry: Registry[object]) -> None:
    assert registry.names()
    for name in registry.names():
        assert registry.get(name) is registry.get(name)
    with pytest.raises(UPQError, match=", ".join(registry.names())):
        registry.get("nothing of that name")

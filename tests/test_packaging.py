"""What is installed and what is published: locks, and the files of wheel and source distribution."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

doctor = import_module("upq.cli.doctor")  # upq.cli's own `doctor` is the command's function
ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_pins_what_make_test_installs(lock: Path) -> None:
    """torch excepted, which pip chooses."""
    locked, constrained = pins(lock), pins(ROOT / "constraints.txt")
    assert {name: locked[name] for name in locked.keys() & constrained.keys()} == {
        name: constrained[name] for name in locked.keys() & constrained.keys()
    }
    extras = re.search(r"^ALL := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert extras is not None
    wanted = list(PROJECT["dependencies"])
    for extra in extras[1].split(","):
        wanted += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        if (name := canonicalize_name(requirement.name)) != "torch":
            assert requirement.specifier.contains(locked[name]), requirement


def test_doctor_knows_every_extra_that_a_user_may_want() -> None:
    known = doctor.EXTRAS | doctor.WITH_GPU
    assert known.keys() == PROJECT["optional-dependencies"].keys() - {"bench", "browser", "docs", "engines", "fuzz"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and source distribution of this tree. Only the plain kernels, hardly optimised, to be quick."""
    uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    tree, dist = tmp_path_factory.mktemp("built") / "tree", tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    stray = tree / "src/upq/kernels/_cpu.cpython-311-stray.so"  # as an editable install of another Python leaves it
    stray.write_bytes(b"")
    quick = [f"cmake.define.UPQ_CXX_HAS_{isa}=OFF" for isa in ("avx2", "avxvnni", "avx512vnni", "neon")]
    settings = [f"--config-setting={setting}" for setting in (*quick, "cmake.build-type=Debug")]
    # The source distribution, and the wheel from it.
    command = [uv, "build", "--quiet", "--python", sys.executable, *settings, "--out-dir", str(dist), str(tree)]
    subprocess.run(command, check=True)
    return dist


@pytest.mark.nightly
def test_a_wheel_has_what_it_needs_and_no_sources(built: Path) -> None:
    (wheel,) = built.glob("upq-*.whl")
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name and not name.endswith("/")}
    compiled = {name for name in names if name.endswith((".so", ".pyd"))}
    files = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = {name.removeprefix("src/") for name in files.stdout.split() if (ROOT / name).is_file()}
    expected = {name for name in expected if not name.startswith("upq/kernels/cpu/")}
    assert len(compiled) == 1
    assert "upq/kernels/_cpu." in str(compiled)
    assert "stray" not in str(compiled)
    assert names - compiled == expected
    # What a release cannot do without, whatever git says.
    assert {"upq/py.typed", "upq/run/recipes/default.yaml", "upq/reports/templates/report.html"} <= names
    assert "upq/world/reference/model.safetensors" in names


@pytest.mark.nightly
def test_a_source_distribution_compiles_elsewhere(built: Path) -> None:
    (source,) = built.glob("upq-*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "src/upq/kernels/cpu/module.cpp"} <= names
    assert not any(name.endswith((".so", ".pyc", ".o")) for name in names)
    assert not names & {"LOG.md", ".ci/run", "docs/run.md"}

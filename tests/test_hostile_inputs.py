"""Templates, tokenizer settings and generation settings of all kinds end in a result or in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile

few = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.base(tmp_path_factory.mktemp("base"))


@settings(few, max_examples=40)
@given(raw=st.binary(min_size=31, max_size=31))
def test_any_input_is_used_or_refused(raw: bytes, base: Path, tmp_path: Path) -> None:
    hostile.use_input(tmp_path / "model", hostile.write_input(base, tmp_path / "model", raw))


@settings(few, max_examples=6)
@given(raw=st.binary(min_size=31, max_size=31))
def test_a_run_on_any_input_ends_in_an_artefact_or_one_line(raw: bytes, base: Path, tmp_path: Path) -> None:
    hostile.run_input(tmp_path / "model", hostile.write_input(base, tmp_path / "model", raw))


def test_the_plainest_input_ends_in_an_artefact(base: Path, tmp_path: Path) -> None:
    """Or the laws above would hold for refusals alone."""
    made = hostile.write_input(base, tmp_path / "model", b"")
    settings = tmp_path / "model" / "generation_config.json"
    settings.write_text('{"do_sample": false, "temperature": 0.7}')  # which transformers does not save
    hostile.run_input(tmp_path / "model", made | {"generated": False})
    assert (tmp_path / "model" / "run" / "upq.json").is_file()
    assert (tmp_path / "model" / "run" / settings.name).read_bytes() == settings.read_bytes()

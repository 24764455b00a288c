"""The levels of the suite: one for every test, and a table that names what is there."""

from pathlib import Path

import pytest

from tests.levels import LEVELS, ORDER, TABLE, level_of, levels_of

TESTS = Path(__file__).resolve().parents[1]


def test_every_test_has_one_level(request: pytest.FixtureRequest) -> None:
    levels = {item.nodeid: levels_of(item) for item in request.session.items}
    assert {nodeid: found for nodeid, found in levels.items() if len(found) != 1} == {}


def test_groups_stay_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist groups tests by the end of their ids."""
    grouped = bool(request.config.getoption("loadgroup", False))
    ids = [item.nodeid for item in request.session.items]
    assert {name.rfind("@") > name.rfind("]") for name in ids} == {grouped}


@pytest.mark.parametrize("entry", TABLE)
def test_the_table_names_what_is_there(entry: str) -> None:
    file, _, name = entry.partition("::")
    path = TESTS / file
    assert path.exists(), f"tests/levels.py: {entry} is gone or has moved"
    assert not name or f"\ndef {name}" in path.read_text(), (
        f"tests/levels.py: no test of {file} begins {name}"
    )


def test_the_longest_entry_counts() -> None:
    assert level_of("tests/rl/loop/test_run.py::test_x[a]") == "e2e"
    assert level_of("tests/rl/loop/test_run.py::test_a_run_that_is_stopped_and_then_fails") == "chaos"
    assert level_of("tests/core/test_new.py::test_x") == "unit"
    assert level_of("tests/core/test_new.py::test_x", ["ray_session"]) == "component"
    assert set(TABLE.values()) | {"unit"} == set(LEVELS) == set(ORDER)

"""Inputs as people's files look like. Whatever is refused leaves no file and asks for no cluster."""

from pathlib import Path

import pytest

CASES = Path(__file__).parent


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """The working directory is an empty one, which a test that refuses leaves empty; connecting to Ray is an error."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("core.cluster.actors.connect", lambda *_, **__: pytest.fail("asked for a cluster"))
    cases = listing(CASES)
    yield here
    assert listing(here) == [] and listing(CASES) == cases


def listing(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)

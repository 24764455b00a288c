"""One tiny random model folder for the tests of the world's training; read it, never write into it."""

from pathlib import Path

import pytest

from tests.fakes.tiny_models import make_tiny_folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")

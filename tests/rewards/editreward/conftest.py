"""One EditReward in a real vLLM for all tests that ask one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.forked_workers import WorkerServer
from tests.fakes.tiny_editreward import make_tiny_editreward
from tests.fakes.vllm_server import Serving


@pytest.fixture(scope="session")
def editreward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny exported EditReward of three dimensions; read it, never write into it."""
    return make_tiny_editreward(tmp_path_factory.mktemp("editreward") / "model")


@pytest.fixture(scope="session")
def serving(
    editreward_folder: Path, tmp_path_factory: pytest.TempPathFactory, vllm_forks: WorkerServer
) -> Iterator[Serving]:
    serving = Serving(editreward_folder, tmp_path_factory.mktemp("serve"), vllm_forks)
    yield serving
    serving.stop()

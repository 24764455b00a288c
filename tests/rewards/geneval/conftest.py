"""Random weights that take seconds to make, once for all tests here. Read them only."""

from pathlib import Path

import pytest

from tests.fakes.tiny_detectors import save_swin_s, save_tiny_clip, save_tiny_hub


@pytest.fixture(scope="session")
def swin_s(tmp_path_factory) -> Path:
    return save_swin_s(tmp_path_factory.mktemp("swin") / "swin_s.pth")


@pytest.fixture(scope="session")
def tiny_hub(tmp_path_factory) -> Path:
    return save_tiny_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))

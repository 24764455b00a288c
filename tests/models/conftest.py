"""Tiny random model folders for all tests of the models; read them, never write into them."""

from pathlib import Path

import pytest

from tests.fakes.tiny_metaquery import make_tiny_metaquery
from tests.fakes.tiny_models import make_tiny_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def metaquery_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny MetaQuery model folder and its Qwen2.5-VL."""
    return make_tiny_metaquery(tmp_path_factory.mktemp("metaquery"))

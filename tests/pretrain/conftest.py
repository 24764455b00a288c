"""Tiny models for all tests of pre-training, made once."""

import pytest

from tests.fakes.tiny_models import make_tiny_folder
from tests.fakes.tiny_vlm import make_tiny_vlm


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Transformer, VAE, scheduler and text encoders in the released layout."""
    return make_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory):
    return make_tiny_vlm(tmp_path_factory.mktemp("tiny") / "vlm")

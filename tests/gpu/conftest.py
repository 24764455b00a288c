"""Tests that need a CUDA card: `python -m pytest tests/gpu`. Elsewhere they are skipped, by name."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def card():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card here; run `python -m pytest tests/gpu` on a machine with one")
